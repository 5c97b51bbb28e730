"""What tests of figures share: drawing without warnings, and labels that may be read."""

import itertools
import warnings

from matplotlib import pyplot
from matplotlib.text import Text

from scripts import plots


def quietly_drawn(name, found):
    """The figure; a layout that does not fit would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = plots.FIGURES[name](found)
        drawn.canvas.draw()
    yield drawn
    pyplot.close(drawn)


def check_labels(figure):
    """No text leaves the figure or lies on another one."""
    renderer = figure.canvas.get_renderer()
    parts = [figure, *figure.subfigs]
    texts = [text for part in parts for text in (part._suptitle, part._supxlabel) if text]
    legends = [
        *(legend for part in parts for legend in part.legends),
        *(axis.get_legend() for axis in figure.axes if axis.get_legend()),
    ]
    texts += [text for legend in legends for text in (legend.get_title(), *legend.get_texts())]
    for axis in figure.axes:
        texts += [axis.title, axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        for side, labels in ((0, axis.get_xticklabels()), (1, axis.get_yticklabels())):
            low, high = (axis.get_xlim(), axis.get_ylim())[side]
            texts += [label for label in labels if low <= label.get_position()[side] <= high]
    shown = [text for text in texts if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in shown]  # without their arrows
    visible = [(name, box) for name, box in boxes if box.width > 0]
    for _, box in visible:
        inches = box.transformed(figure.dpi_scale_trans.inverted())
        assert inches.x0 >= -0.01 and inches.x1 <= figure.get_figwidth() + 0.01
        assert inches.y0 >= -0.01 and inches.y1 <= figure.get_figheight() + 0.01
    for (one, first), (other, second) in itertools.combinations(visible, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert width <= 1 or height <= 2, (one, other)
