"""Generated prose about a river country: varied sentences from a small grammar, and ledger entries to hide in it."""

import random
import re

_SLOT = re.compile(r"\{(\w+)\}")

GRAMMAR: dict[str, tuple[str, ...]] = {
    "sentence": (
        "{Time}, {person} {walked} {along} and {noticed} {thing}.",
        "{Person} {said} that {place} had {changed} since {event}.",
        "The {adjective} {building} near {place} was {used} by {group} until {event}.",
        "{Time}, {group} {gathered} at {place} to {talk} {topic}.",
        "Nobody in {place} could {remember} {when} {building_phrase} had last been {repaired}.",
        "Although {weather}, {group} {kept} {activity} {until}.",
        "{Weather_cap}, and {person} {decided} to {plan} instead.",
        "There were {amount} {animals} {where}, and {person} {counted} them {manner}.",
        "According to {person}, {topic} had {always} been {judged} in {place}.",
        "{Person} {bought} {goods} from {group} and {carried} them {along}.",
        "It was {person} who first {suggested} that {group} should {plan}.",
        "{Time}, a {adjective} smell of {smell} drifted {along}.",
        "The children of {place} {played} {where} while {group} {kept} {activity}.",
        "{Person} wrote a {adjective} letter about {topic}, but {never_sent}.",
        "When {event}, {person} {walked} {along} without {regret}.",
        "Every {season}, {group} {painted} the {building} and {shared} {goods} among themselves.",
        "The road to {place} runs {along}, past a {adjective} {building} and {thing}.",
        "{Person} had a habit of {habit}, which {group} found {judged}.",
        "What {person} liked best about {place} was {thing} and the smell of {smell}.",
        "Some people {said} that {event}, though {person} {doubted} it.",
    ),
    "person": (
        "the ferry keeper", "old Bram", "Sister Odile", "the schoolteacher", "Yorick the miller", "a visiting surveyor",
        "the baker's niece", "Captain Hale", "the lock keeper", "Ilse", "the younger clerk", "Marten", "the beekeeper",
        "Doctor Wen", "the innkeeper", "Rosalind", "a travelling tinker", "the organist", "Piet", "the postmistress",
    ),
    "place": (
        "the lower village", "Marrow Ford", "the east bank", "Tern Hollow", "the market square", "Ashby Lock",
        "the old quarry", "Saltmarsh End", "the upper meadows", "Crane Island", "the mill pond", "Fenwick Cross",
        "the long causeway", "Harrow Wood", "the ropewalk", "Candle Street", "the boatyard", "Linden Hill",
    ),
    "group": (
        "the weavers", "three fishermen", "the town council", "the ferrymen", "a party of walkers", "the choir",
        "the market women", "some apprentices", "the bell ringers", "the shepherds", "two carpenters", "the neighbours",
        "the harvest workers", "a handful of students", "the lamplighters", "the boat builders",
    ),
    "building": (
        "chapel", "granary", "boathouse", "toll house", "smithy", "watchtower", "brewery", "schoolhouse", "barn",
        "bakery", "windmill", "storehouse", "library", "stable", "footbridge", "greenhouse",
    ),
    "building_phrase": (
        "the stone bridge", "the chapel roof", "the harbour wall", "the clock on the square", "the wooden jetty",
        "the sluice gate", "the well behind the inn", "the orchard fence", "the organ", "the ferry's engine",
    ),
    "adjective": (
        "narrow", "crooked", "quiet", "whitewashed", "forgotten", "cheerful", "dusty", "handsome", "faded", "long",
        "peculiar", "sturdy", "draughty", "half-finished", "low", "sunlit",
    ),
    "time": (
        "early in the morning", "shortly before noon", "towards evening", "on the first cold day", "after the harvest",
        "in the middle of the week", "during the long frost", "one wet afternoon", "late in the summer",
        "before the lamps were lit", "on market day", "at the turn of the tide", "not long afterwards",
    ),
    "walked": ("walked", "hurried", "wandered", "rode", "strolled", "limped", "went on foot", "cycled"),
    "along": (
        "along the river", "across the stubble fields", "past the orchard wall", "down the steep lane",
        "through the birch wood", "over the little bridge", "towards the harbour", "between the hedges",
        "beside the canal", "up to the ridge", "through the reeds", "round the edge of the marsh",
    ),
    "noticed": ("noticed", "pointed out", "stopped to sketch", "nearly stepped on", "admired", "came upon"),
    "thing": (
        "a row of empty beehives", "a boat without oars", "the marks of last year's flood", "a heron on one leg",
        "a gate that would not close", "two chimneys without smoke", "a basket of windfall apples",
        "the shadow of a kite", "a milestone with no number", "a lantern left burning", "a cart with a broken axle",
        "fresh tracks in the mud", "a bench carved with initials", "a patch of late snow",
    ),
    "said": ("said", "claimed", "insisted", "explained", "complained", "used to say", "admitted", "repeated"),
    "changed": (
        "changed very little", "become noisier", "grown poorer", "lost its best trees", "been much improved",
        "gained a second inn", "fallen out of fashion", "begun to look like any other place",
    ),
    "event": (
        "the river had frozen over", "the new road was opened", "the last ferry sank", "the school burned down",
        "the swallows came back", "the mill changed hands", "the great storm passed", "the fair moved away",
        "the price of wool fell", "the old bell cracked", "the surveyors left", "the first train arrived",
    ),
    "used": ("used", "rented", "looked after", "avoided", "shared", "owned", "visited every week"),
    "gathered": ("gathered", "met", "sat down together", "turned up", "waited", "came together"),
    "talk": ("talk about", "settle the question of", "argue over", "vote on", "hear the news about", "laugh about"),
    "topic": (
        "the price of candles", "the depth of the channel", "the colour of the new boats", "the rights of way",
        "the late harvest", "the missing weathercock", "the wages of the ferrymen", "the rules of the regatta",
        "the quality of the flour", "the cost of coal", "the shape of the new sails", "the number of geese",
    ),
    "remember": ("remember", "say", "explain", "agree on", "find out"),
    "when": ("when", "why", "in which year", "by whom", "how"),
    "repaired": ("repaired", "painted", "cleaned", "measured", "inspected", "moved", "taken apart"),
    "weather": (
        "rain was falling", "the fog had not lifted", "the wind kept turning", "frost lay on the fields",
        "the heat was hard to bear", "thunder could be heard in the hills", "the light was already going",
    ),
    "weather_cap": (
        "The morning was grey", "Hail came down before breakfast", "The wind blew from the sea",
        "It had snowed all night", "The sky cleared at last", "A warm rain set in", "Mist covered the water",
    ),
    "kept": ("kept on", "went on", "carried on", "insisted on", "took turns at"),
    "activity": (
        "mending nets", "stacking firewood", "picking plums", "sweeping the quay", "rehearsing the anthem",
        "sorting potatoes", "cutting reeds", "patching the sails", "loading barrels", "shearing sheep",
        "whitewashing the walls", "digging the new ditch",
    ),
    "until": (
        "until it was dark", "for the rest of the day", "until somebody brought soup", "as if nothing had happened",
        "until the church clock struck six", "with great patience", "in spite of everything",
    ),
    "decided": ("decided", "was persuaded", "resolved", "offered", "had no choice but"),
    "plan": (
        "stay at home", "dredge the harbour", "plant a row of poplars", "start a savings bank", "take the upper road",
        "write to the newspaper", "invite the neighbours", "build a second oven", "keep bees", "learn the flute",
        "raise the bridge by a foot", "wait for the spring",
    ),
    "amount": ("seven", "a dozen", "fewer than twenty", "several hundred", "nineteen", "countless", "only four"),
    "animals": ("geese", "herons", "lambs", "swallows", "mules", "ducks", "foxes", "carp", "starlings", "goats"),
    "where": (
        "by the water", "on the common", "under the arches", "behind the brewery", "on the sandbank",
        "in the churchyard", "along the towpath", "in the tall grass",
    ),
    "counted": ("counted", "watched", "fed", "drew", "described"),
    "manner": ("twice", "from a distance", "with great care", "without much hope", "for an hour", "by lantern light"),
    "always": ("always", "never", "often", "hardly ever", "for years"),
    "judged": (
        "a matter of pride", "rather tiresome", "taken very seriously", "a private affair", "a cause of quarrels",
        "perfectly ordinary", "a sign of good luck", "difficult to defend",
    ),
    "bought": ("bought", "borrowed", "collected", "ordered", "bartered for"),
    "goods": (
        "two sacks of barley", "a crate of pears", "some blue cloth", "a coil of rope", "a barrel of herring",
        "a bundle of willow rods", "three cheeses", "a box of nails", "a jar of honey", "a load of slates",
    ),
    "carried": ("carried", "dragged", "wheeled", "took", "shipped"),
    "suggested": ("suggested", "proposed", "thought", "hinted", "wished"),
    "smell": ("tar", "fresh bread", "wet wool", "hay", "wood smoke", "cider", "river mud", "lavender", "paint"),
    "played": ("played", "hid", "raced one another", "built dams", "flew kites", "told stories"),
    "never_sent": (
        "never sent it", "lost it in the marsh", "burned it the same night", "forgot to sign it",
        "sent it to the wrong address", "kept it in a drawer",
    ),
    "regret": ("looking back", "saying a word", "a coat", "asking the way", "any hurry", "a lantern"),
    "season": ("spring", "autumn", "winter", "second summer", "Easter", "market season"),
    "painted": ("painted", "swept", "decorated", "aired", "locked"),
    "shared": ("shared", "divided", "sold", "hid", "raffled"),
    "habit": (
        "talking to the horses", "counting the steps to the quay", "whistling in church", "collecting old keys",
        "getting up before dawn", "naming every boat", "answering with proverbs", "sleeping in the afternoon",
    ),
    "doubted": ("doubted", "denied", "never believed", "would not hear of", "smiled at"),
}  # fmt: skip

_FIRST = ("Maren", "Tobias", "Anselm", "Greta", "Ruben", "Salome", "Casper", "Noor", "Edda", "Lucan", "Petra", "Ivo")
_LAST = (
    "Oduya",
    "Velten",
    "Harcastle",
    "Brinkman",
    "Solano",
    "Quist",
    "Aldane",
    "Torvik",
    "Marsh",
    "Okafor",
    "Delling",
)
_GOODS = (
    "copper lanterns",
    "oak barrels",
    "silk scarves",
    "brass compasses",
    "clay jugs",
    "iron stoves",
    "silver spoons",
)
_TOWNS = ("Tellin", "Osterby", "Carrick", "Dunmere", "Valdis", "Norwold", "Hexley", "Pellworm", "Rosmar", "Quenby")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "December")
_WORDS = (
    "saffron",
    "falcon",
    "marble",
    "thimble",
    "orchid",
    "anchor",
    "walnut",
    "velvet",
    "comet",
    "pepper",
    "granite",
)


def paragraph(source: random.Random) -> str:
    """Four to seven sentences of prose, about 60 to 110 words."""
    return " ".join(_expand("sentence", source) for _ in range(source.randint(4, 7)))


def _expand(symbol: str, source: random.Random) -> str:
    """Text for a symbol of the grammar; a symbol with a capital gives text with a capital."""
    pattern = source.choice(GRAMMAR[symbol if symbol in GRAMMAR else symbol.lower()])
    text = _SLOT.sub(lambda slot: _expand(slot.group(1), source), pattern)
    return text[0].upper() + text[1:] if symbol[0].isupper() else text


def record(source: random.Random) -> tuple[str, tuple[str, ...]]:
    """What the ledger says about a person, about 35 tokens, and the values that an answer must repeat."""
    day = f"{source.randint(1, 28)} {source.choice(_MONTHS)}"
    count, goods, town = str(source.randint(11, 99)), source.choice(_GOODS), source.choice(_TOWNS)
    price, word = str(source.randint(101, 999)), source.choice(_WORDS)
    text = f"{count} {goods} | town: {town} | date: {day} | price: {price} crowns | code word: {word}."
    return text, (f"{count} {goods}", town, day, f"{price} crowns", word)


def names(source: random.Random, count: int) -> list[str]:
    """`count` full names that share neither first nor last name."""
    pairs = zip(source.sample(_FIRST, count), source.sample(_LAST, count), strict=True)
    return [f"{first} {last}" for first, last in pairs]
