"use strict";
(() => {
  const table = document.getElementById("run-table");
  if (table) {
    const body = table.tBodies[0];
    const heads = Array.from(table.tHead.rows[0].cells);
    const lines = Array.from(body.rows);
    const compare = (index, numeric, sign) => (left, right) => {
      const [a, b] = [left, right].map((line) => line.cells[index].dataset.key);
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      const order = numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
      return sign * order || lines.indexOf(left) - lines.indexOf(right);
    };
    heads.forEach((head, index) => {
      const numeric = head.dataset.kind === "number";
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const up = before === "none" ? !numeric : before === "descending";
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        body.append(...lines.slice().sort(compare(index, numeric, up ? 1 : -1)));
      });
    });

    const box = document.getElementById("filter");
    const count = document.getElementById("filter-count");
    const searched = heads.flatMap((head, index) => (head.dataset.kind === "text" ? [index] : []));
    const texts = lines.map((line) => searched.map((index) => line.cells[index].innerText).join(" ").toLowerCase());
    const begins = (word) => {
      const start = /^[\p{L}\p{N}]/u.test(word) ? "(?<![\\p{L}\\p{N}])" : "";
      return new RegExp(start + word.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "u");
    };
    const filter = () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean).map(begins);
      let shown = 0;
      lines.forEach((line, index) => {
        line.hidden = !words.every((word) => word.test(texts[index]));
        shown += !line.hidden;
      });
      count.textContent = `${shown} of ${lines.length} runs`;
    };
    box.addEventListener("input", filter);
    box.closest(".filter").hidden = false;
    filter();
  }

  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let block = target; block; block = block.parentElement) if (block.tagName === "DETAILS") block.open = true;
    if (target) target.scrollIntoView();
  };
  addEventListener("hashchange", open);
  open();
})();
