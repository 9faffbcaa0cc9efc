"""Wire formats against what vLLM and SGLang servers really answered; `recorded_answers.json` says where each is from.

Requests: `prompt_logprobs` on /v1/completions with token-id prompts, tests/entrypoints/openai/test_completion.py at
c85810ad in vllm-project/vllm; `input_ids`, `return_logprob`, `top_logprobs_num` and `logprob_start_len`, the position
before the first one that is scored: test/srt/test_srt_endpoint.py `test_logprob_start_len` at 2fce449b in
sgl-project/sglang, docs.sglang.io/basic_usage/sampling_params.
"""

import copy
import json
from pathlib import Path

import pytest

from opd_mcp.engine.scoring.dialects import WireError, read_answer, request_body

RECORDED = json.loads(Path(__file__).with_name("recorded_answers.json").read_bytes())
IDS = [11, 22, 33]


def recorded(name: str) -> tuple[dict, list[int]]:
    return copy.deepcopy(RECORDED[name]["answer"]), RECORDED[name]["ids"]


def test_vllm_keys_are_strings_the_first_entry_is_null_and_a_token_beyond_the_top_k_is_one_more_entry():
    answer, ids = recorded("vllm_top2")
    positions = answer["choices"][0]["prompt_logprobs"]
    assert positions[0] is None
    assert [len(entries) for entries in positions[1:]] == [3, 2, 2, 3, 3, 3]
    scores = read_answer("vllm", answer, ids, 1, 2)
    assert scores.logprobs == [
        -9.352765083312988,
        -1.4278249740600586,
        -0.976689338684082,
        -5.6148481369018555,
        -4.214991569519043,
        -4.99854040145874,
    ]
    assert scores.topk_ids == [[100, 133], [6, 328], [38, 1437], [437, 33], [110, 5], [92, 793]]
    assert scores.topk_logprobs[0] == [-1.4278708696365356, -2.4365129470825195]
    assert read_answer("vllm", answer, ids, 4, 0).logprobs == scores.logprobs[3:]


def test_vllm_s_own_token_is_found_by_its_id_wherever_it_stands():
    answer, ids = recorded("vllm_top1_own_last")
    scores = read_answer("vllm", answer, ids, 1, 1)
    assert scores.logprobs == [-0.26888129115104675, -10.421473503112793, -6.669814109802246]
    assert scores.topk_ids == [[430], [279], [604]]


def test_the_rank_decides_between_equal_log_probs():
    answer, ids = recorded("vllm_top2")
    last = answer["choices"][0]["prompt_logprobs"][6]
    last["4758"]["logprob"] = last["793"]["logprob"]
    assert read_answer("vllm", answer, ids, 6, 2).topk_ids == [[92, 793]]
    del last["4758"]["rank"]  # serve-teacher gives none to a token beyond the top k
    assert read_answer("opd-mcp", answer, ids, 6, 2).topk_ids == [[92, 793]]


def test_sglang_s_triples_are_log_prob_id_text_and_begin_with_a_null():
    answer, ids = recorded("sglang_top3")
    assert request_body("sglang", "any", ids, 2, 3)["logprob_start_len"] == 1
    scores = read_answer("sglang", answer, ids, 2, 3)
    assert scores.logprobs == [-0.58203125, -3.53125, -2.84375]
    assert scores.topk_ids == [[315, 3283, 374], [279, 9625, 5616], [13, 58883, 11]]
    assert scores.topk_logprobs[2] == [-2.09375, -2.34375, -2.40625]


def test_sglang_s_answer_may_hold_texts_and_begin_after_the_null():
    answer, ids = recorded("sglang_with_text")
    assert read_answer("sglang", answer, ids, 1, 0).logprobs == [-4.267991065979004]


@pytest.mark.parametrize("value", RECORDED["stand_ins_for_infinity"]["values"])
@pytest.mark.parametrize("own", [True, False])
def test_what_stands_for_minus_infinity_is_no_log_prob(value, own):
    vllm, ids = recorded("vllm_top2")
    entries = vllm["choices"][0]["prompt_logprobs"][3]
    entries["38" if own else "1437"]["logprob"] = value
    sglang, sglang_ids = recorded("sglang_top3")
    meta = sglang["meta_info"]
    (meta["input_token_logprobs"][2] if own else meta["input_top_logprobs"][2][1])[0] = value
    for dialect, answer, asked in (("vllm", vllm, ids), ("opd-mcp", vllm, ids), ("sglang", sglang, sglang_ids)):
        with pytest.raises(WireError, match="not finite"):
            read_answer(dialect, answer, asked, 2, 2)


def test_requests_state_temperature_and_top_p_since_servers_have_defaults_of_their_own():
    vllm = request_body("vllm", "teacher", IDS, 2, 5)
    assert vllm == {
        "model": "teacher",
        "prompt": [11, 22, 33],
        "max_tokens": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "prompt_logprobs": 5,
    }
    sglang = request_body("sglang", "teacher", IDS, 2, 5)
    assert sglang["input_ids"] == IDS
    assert sglang["return_logprob"] is True
    assert sglang["logprob_start_len"] == 1
    assert sglang["top_logprobs_num"] == 5
    assert sglang["sampling_params"]["temperature"] == 1.0


def vllm_but(change) -> dict:
    answer = recorded("vllm_top2")[0]
    change(answer["choices"][0])
    return answer


def sglang_but(change) -> dict:
    answer = recorded("sglang_top3")[0]
    change(answer["meta_info"])
    return answer


@pytest.mark.parametrize(
    ("dialect", "answer", "why"),
    [
        ("vllm", vllm_but(lambda c: c["prompt_logprobs"].pop()), "another length"),
        ("vllm", vllm_but(lambda c: c["prompt_logprobs"][2].pop("6")), "other tokens"),
        ("vllm", vllm_but(lambda c: c.update(prompt_logprobs=None)), "another length"),
        ("vllm", vllm_but(lambda c: c.pop("prompt_logprobs")), "expected fields"),
        ("vllm", vllm_but(lambda c: c["prompt_logprobs"][2].pop("328")), "fewer top"),
        ("vllm", "no object", "expected fields"),
        ("sglang", sglang_but(lambda m: m["input_token_logprobs"].pop()), "other tokens"),
        ("sglang", sglang_but(lambda m: m.pop("input_top_logprobs")), "expected fields"),
        ("sglang", sglang_but(lambda m: m["input_top_logprobs"][2].pop()), "fewer top"),
        ("sglang", sglang_but(lambda m: m.update(input_token_logprobs=[])), "another length"),
        ("sglang", [], "expected fields"),
    ],
)
def test_anything_else_is_an_error_that_says_why(dialect, answer, why):
    ids = RECORDED["vllm_top2" if dialect == "vllm" else "sglang_top3"]["ids"]
    with pytest.raises(WireError, match=why):
        read_answer(dialect, answer, ids, 2, 3 if dialect == "sglang" else 2)
