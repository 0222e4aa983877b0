"""Reading a program's text: sizes of arrays, and errors for what is not understood."""

import pytest

from deco_jax.planning import hlo


def program(*lines):
    return "\n".join(["HloModule test", "ENTRY %main (p: f32[1]) -> f32[1] {", *lines, "}"])


def shape(text):
    entry, _ = hlo.parse(program(f"  ROOT %p = {text} parameter(0)"))
    return entry["p"].shapes[0]


def test_the_padding_of_tiles_counts():
    assert shape("f32[4,100]{1,0:T(8,128)}").bytes == 8 * 128 * 4
    assert shape("bf16[2,3,100,5]{2,3,1,0:T(8,128)(2,1)}").bytes == 2 * 3 * 8 * 128 * 2, "minor axes are 5 and 100"
    assert shape("f32[4,100]{1,0}").bytes == 1600
    assert shape("f8e4m3fn[10]{0}").bytes == shape("s8[10]{0}").bytes == shape("pred[10]{0}").bytes == 10


def test_small_memories_on_the_chip_are_not_hbm():
    assert shape("f32[100]{0:T(128)S(1)}").hbm == 0
    assert shape("f32[100]{0}").hbm == 400


def test_every_part_of_a_line_is_found():
    entry, _ = hlo.parse(
        program(
            '  %p = f32[2]{0} parameter(0), metadata={op_name="x"}',
            "  ROOT %s.1 = ((f32[2]{0}, token[]), f32[4]{0}, u32[]{:S(2)}) all-gather-start(%p, /*index=1*/%p), "
            "channel_id=3, replica_groups=[1,2]<=[2]",
        )
    )
    start = entry["s.1"]
    assert [str(shape) for shape in start.shapes] == ["f32[2]", "token[]", "f32[4]", "u32[]"]
    assert (start.kind, start.operands, start.channel, start.is_root) == ("all-gather", ("p", "p"), "3", True)
    assert entry["p"].find(r'op_name="([^"]*)"') == "x" and entry["p"].text == "0" and not entry["p"].kind


@pytest.mark.parametrize(
    "line",
    [
        "f32[10]{0} collective-broadcast(%p), replica_groups={{0,1}}",
        "f32[10]{0} fancy-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add",
        "(f32[10]{0}, u32[]) teleport-start(%p)",
        "(f32[10]{0}, token[]) infeed(%p)",
        "f32[10]{0} add(%p, %p",
    ],
)
def test_an_unknown_form_is_an_error_that_shows_it(line):
    """What is not understood could be all of a program's traffic: a count without it would look like an answer."""
    with pytest.raises(hlo.TextError, match=r"%c = "):
        hlo.parse(program("  %p = f32[10]{0} parameter(0)", f"  ROOT %c = {line}"))
