"""A result's text: paths and evidence in a few lines, whatever else it holds cut to size."""

from opd_mcp.server.render.runs import compact, result_lines

RESULT = {
    "artifacts": {"model": "model-1", "report": "report-1"},
    "paths": {"model": "/w/artifacts/model/model-1"},
    "scores": {
        "distilled": {"greedy_accuracy": [0.81234567, 0.77, 0.85], "eos_rate": 1.0, "pass_at_k": {"1": 0.5}},
        "sft": {"greedy_accuracy": [0.4, 0.35, 0.45]},
    },
    "comparisons": [{"candidate": "distilled", "baseline": "sft", "accuracy_difference": [0.41, 0.36, 0.46]}],
    "training": {"sft": {"steps": 250, "seconds_per_step": 0.01234567, "final": {"loss": 0.5}}},
    "costs": [
        {"stage": "sft", "seconds": 3.08642, "reused": False},
        {"stage": "rollout", "seconds": 0, "reused": True},
    ],
}


def test_the_evidence_comes_with_its_intervals():
    lines = result_lines(RESULT)
    assert "model: /w/artifacts/model/model-1" in lines
    assert "report: report-1" in lines
    assert "score of distilled: greedy_accuracy 0.8123 [0.77, 0.85], eos_rate 1, pass_at_k {1: 0.5}" in lines
    assert "accuracy of distilled minus sft: 0.41 [0.36, 0.46]" in lines
    assert "sft: 250 steps of 0.01235 s; at the end loss 0.5" in lines
    assert "seconds by stage: sft 3.086, rollout reused" in lines


def test_the_gap_what_is_absent_and_what_could_not_be_read_have_a_line_each():
    lines = result_lines(
        {
            "teacher_row": "teacher",
            "gap_closed": [
                {"from": "sft", "to": "teacher", "share": [0.71, 0.6, 0.83]},
                {"from": "base", "to": "teacher", "share": "teacher is not more accurate"},
            ],
            "not_measured": {"base": "it is not here"},
            "no_answer": ["sft: 3 of 40 responses had no extractable answer; they end: `…and so`."],
            "teacher_responses": "9 of 10 are right.",
        }
    )
    assert lines == [
        "share of the gap closed from sft to teacher: 0.71 [0.6, 0.83]",
        "share of the gap closed from base to teacher: not measured: teacher is not more accurate",
        "not measured: base: it is not here",
        "sft: 3 of 40 responses had no extractable answer; they end: `…and so`.",
        "before the SFT: 9 of 10 are right.",
    ]


def test_parts_that_are_not_known_here_are_shown_as_json():
    assert result_lines({"note": {"a": 1, "b": None, "c": float("nan")}}) == ['{"note":{"a":1}}']


def test_a_result_of_another_shape_breaks_nothing():
    assert result_lines({"paths": "x", "scores": [1], "costs": {"a": 1}, "training": {"sft": 1}}) == []


def test_a_large_value_is_cut_and_says_so():
    text = compact({"models": ["x" * 100] * 100})
    assert len(text) < 3100
    assert text.endswith("… (7312 more characters; the structured answer has all of it)")
