"""A tape as JSON, and as a picture: what stands in it, where, and that it can be read."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from torch import nn

from entrenar.autograd.tape import Tape


@pytest.fixture
def tape() -> Tape:
    """A module, an operation that is torch's, one with several results, one without inputs."""
    linear, x = nn.Linear(3, 4), torch.ones(2, 3)
    with Tape() as tape:
        first, second = linear(x).cumsum(0).split(2, 1)
        first * second + torch.ones(2, 2)
    return tape


def test_json_has_every_field(tape, tmp_path):
    tape.export(tmp_path / "tape.json")
    text = (tmp_path / "tape.json").read_text()
    assert len(text.splitlines()) > len(tape)
    entries = json.loads(text)
    assert [entry["index"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert entries[0] == {
        "index": 1,
        "op": "linear",
        "ours": True,
        "module": "",
        "inputs": [
            {"name": "v0", "shape": [2, 3], "dtype": "float32", "gradient": False},
            {"name": "v1", "shape": [4, 3], "dtype": "float32", "gradient": True},
            {"name": "v2", "shape": [4], "dtype": "float32", "gradient": True},
        ],
        "outputs": [{"name": "v3", "shape": [2, 4], "dtype": "float32", "gradient": True}],
        "seconds": tape.entries[0].seconds,
        "saved_bytes": tape.entries[0].saved_bytes,
    }
    assert entries[1]["ours"] is False


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures_are_of_the_kind_that_their_ending_says(tape, tmp_path, ending, start):
    tape.export(tmp_path / f"tape.{ending}")
    assert (tmp_path / f"tape.{ending}").read_bytes().startswith(start)


def test_other_endings_are_refused(tape, tmp_path):
    with pytest.raises(ValueError, match=r"tape\.txt: a tape is written as \.json, or drawn"):
        tape.export(tmp_path / "tape.txt")


def test_up_to_sixty_operations_can_be_drawn(tmp_path):
    with Tape() as tape:
        x = torch.ones(1)
        for _ in range(59):
            x = x.exp()
    tape.export(tmp_path / "tape.svg")
    assert "60. exp" in (tmp_path / "tape.svg").read_text()
    with tape:
        x.exp()
    with pytest.raises(ValueError, match=r"at most 60 operations, and the tape has 61: use \.json"):
        tape.export(tmp_path / "tape.svg")


def test_without_matplotlib_the_error_says_how_to_get_it(tape, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'entrenar\[cli\]'"):
        tape.export(tmp_path / "tape.png")


@pytest.fixture
def figure(tape, tmp_path, monkeypatch) -> Figure:
    """The picture of the tape, drawn."""
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: drawn.append(self) or save(self, *args, **kw))
    tape.export(tmp_path / "tape.png")
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    return figure


def boxes(figure: Figure) -> dict[str, Text]:
    """The boxes in the picture, by the last line of what they say."""
    texts = [text for text in figure.axes[0].texts if not isinstance(text, Annotation)]
    return {text.get_text().splitlines()[-1]: text for text in texts}


def frame(figure: Figure, text: Text) -> Bbox:
    return text.get_bbox_patch().get_window_extent(figure.canvas.get_renderer())


def test_every_operation_and_every_input_has_a_box(figure):
    said = [text.get_text() for text in boxes(figure).values()]
    assert said == [
        "1. linear\nv3",
        "2. cumsum\nv4",
        "3. split\nv5, v6",
        "4. mul\nv7",
        "5. ones\nv8",
        "6. add\nv9",
        "v0: [2, 3] f32",
        "v1: [4, 3] f32",
        "v2: [4] f32",
    ]


def test_boxes_lie_in_the_picture_and_apart(figure):
    frames = {name: frame(figure, text) for name, text in boxes(figure).items()}
    width, height = figure.canvas.get_width_height()
    for box in frames.values():
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height
    for (name, one), (other, two) in itertools.combinations(frames.items(), 2):
        assert not one.overlaps(two), f"{name} overlaps {other}"


def test_the_picture_is_filled(figure):
    """Less than a box of empty space on any side, and no axes."""
    frames = [frame(figure, text) for text in boxes(figure).values()]
    width, height = figure.canvas.get_width_height()
    largest = max(box.width for box in frames), max(box.height for box in frames)
    assert min(box.x0 for box in frames) < largest[0]
    assert width - max(box.x1 for box in frames) < largest[0]
    assert min(box.y0 for box in frames) < largest[1]
    assert height - max(box.y1 for box in frames) < largest[1]
    assert not figure.axes[0].axison


def test_text_stands_in_the_middle_of_its_place(figure):
    for text in boxes(figure).values():
        box = frame(figure, text)
        x, y = text.get_transform().transform(text.get_position())
        # Of a few pixels' difference between a letter's box and the line's.
        assert abs((box.x0 + box.x1) / 2 - x) < 4
        assert abs((box.y0 + box.y1) / 2 - y) < 4


def test_colours_and_shapes_tell_the_kinds_apart(figure):
    found = boxes(figure)
    colours = {name: to_hex(text.get_bbox_patch().get_facecolor()) for name, text in found.items()}
    ours, theirs, parameter, constant = (colours[name] for name in ("v3", "v4", "v1: [4, 3] f32", "v0: [2, 3] f32"))
    assert len({ours, theirs, parameter, constant}) == 4
    assert colours["v7"] == colours["v9"] == ours
    assert colours["v5, v6"] == colours["v8"] == theirs
    assert colours["v2: [4] f32"] == parameter
    shapes = {name: type(text.get_bbox_patch().get_boxstyle()) for name, text in found.items()}
    assert shapes["v3"] == shapes["v4"] != shapes["v1: [4, 3] f32"] == shapes["v0: [2, 3] f32"]


def test_arrows_lead_from_what_was_computed_to_what_was_computed_of_it(figure):
    found = boxes(figure)
    names = {text.get_position(): name for name, text in found.items()}
    arrows = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    assert not any(arrow.get_text() for arrow in arrows)
    assert [(names[arrow.xyann], names[arrow.xy]) for arrow in arrows] == [
        ("v0: [2, 3] f32", "v3"),
        ("v1: [4, 3] f32", "v3"),
        ("v2: [4] f32", "v3"),
        ("v3", "v4"),
        ("v4", "v5, v6"),
        ("v5, v6", "v7"),
        ("v5, v6", "v7"),
        ("v7", "v9"),
        ("v8", "v9"),
    ]
    for arrow in arrows:
        patch = arrow.arrow_patch
        points = patch.get_transform().transform(patch.get_path().vertices)
        for end in (arrow.xyann, arrow.xy):
            # It begins and ends beside the boxes, not below them, and near.
            box = frame(figure, found[names[end]])
            assert not any(box.contains(*point) for point in points)
            assert any(box.padded(20).contains(*point) for point in points)


def test_rows_go_down_and_columns_to_the_right_without_gaps(figure):
    assert {name: text.get_position() for name, text in boxes(figure).items()} == {
        "v0: [2, 3] f32": (0, 0),
        "v1: [4, 3] f32": (1, 0),
        "v2: [4] f32": (2, 0),
        "v3": (0, 1),
        "v8": (1, 1),
        "v4": (0, 2),
        "v5, v6": (0, 3),
        "v7": (0, 4),
        "v9": (0, 5),
    }


def test_a_tape_of_nothing_is_an_empty_picture(tmp_path):
    Tape().export(tmp_path / "tape.png")
    assert (tmp_path / "tape.png").exists()
