"""Wire formats against examples in the shape that vLLM's and SGLang's own sources and tests state.

vLLM: `vllm/logprobs.py` (`Logprob`: logprob, rank, decoded_token; `PromptLogprobs` starts with None), API reference
docs.vllm.ai/en/v0.10.2/api/vllm/logprobs.html; `prompt_logprobs` on /v1/completions with token-id prompts:
tests/entrypoints/openai/test_completion.py at c85810ad in vllm-project/vllm.
SGLang: `detokenize_logprob_tokens` in python/sglang/srt/managers/tokenizer_manager.py gives (logprob, token id, text or
None); `prompt_tokens == logprob_start_len + len(input_token_logprobs)`: test/srt/test_srt_endpoint.py
`test_logprob_start_len` at 2fce449b in sgl-project/sglang; request fields: docs.sglang.io/basic_usage/sampling_params.
"""

import pytest

from opd_mcp.engine.teachers.wire import WireError, read_answer, request_body

IDS = [11, 22, 33]


def vllm_answer() -> dict:
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": "teacher",
        "choices": [
            {
                "index": 0,
                "text": " x",
                "finish_reason": "length",
                "logprobs": None,
                "prompt_logprobs": [
                    None,
                    {
                        "22": {"logprob": -2.5, "rank": 7, "decoded_token": " b"},
                        "5": {"logprob": -0.25, "rank": 1, "decoded_token": " a"},
                        "6": {"logprob": -1.75, "rank": 2, "decoded_token": " c"},
                    },
                    {
                        "33": {"logprob": -0.5, "rank": 1, "decoded_token": " d"},
                        "8": {"logprob": -1.5, "rank": 2, "decoded_token": " e"},
                    },
                ],
            }
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1},
    }


def sglang_answer(start: int = 0) -> dict:
    tokens = [[None, 11, None], [-2.5, 22, None], [-0.5, 33, None]]
    tops = [None, [[-0.25, 5, None], [-1.75, 6, None]], [[-0.5, 33, None], [-1.5, 8, None]]]
    return {
        "text": " x",
        "meta_info": {
            "prompt_tokens": 3,
            "completion_tokens": 1,
            "input_token_logprobs": tokens[start:],
            "input_top_logprobs": tops[start:],
            "output_token_logprobs": [[-0.1, 4, None]],
        },
    }


@pytest.mark.parametrize(
    ("dialect", "answer"),
    [("vllm", vllm_answer()), ("sglang", sglang_answer()), ("sglang", sglang_answer(1)), ("opd-mcp", vllm_answer())],
)
def test_each_server_s_answer_is_read_alike(dialect, answer):
    scores = read_answer(dialect, answer, IDS, 1, 2)
    assert scores.logprobs == [-2.5, -0.5]
    assert scores.topk_ids == [[5, 6], [33, 8]]
    assert scores.topk_logprobs == [[-0.25, -1.75], [-0.5, -1.5]]
    assert read_answer(dialect, answer, IDS, 2, 0).logprobs == [-0.5]


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


def spoiled(answer: dict, change) -> dict:
    change(answer)
    return answer


@pytest.mark.parametrize(
    ("dialect", "answer", "why"),
    [
        ("vllm", spoiled(vllm_answer(), lambda a: a["choices"][0]["prompt_logprobs"].pop()), "another length"),
        ("vllm", spoiled(vllm_answer(), lambda a: a["choices"][0]["prompt_logprobs"][2].pop("33")), "other tokens"),
        ("vllm", spoiled(vllm_answer(), lambda a: a["choices"][0].pop("prompt_logprobs")), "expected fields"),
        ("vllm", spoiled(vllm_answer(), lambda a: a["choices"][0]["prompt_logprobs"][2].pop("8")), "fewer top"),
        ("sglang", spoiled(sglang_answer(), lambda a: a["meta_info"]["input_token_logprobs"].pop()), "other tokens"),
        ("sglang", spoiled(sglang_answer(), lambda a: a["meta_info"].pop("input_top_logprobs")), "expected fields"),
        ("sglang", {"meta_info": {"input_token_logprobs": []}}, "another length"),
        ("sglang", [], "expected fields"),
        ("vllm", "no object", "expected fields"),
    ],
)
def test_anything_else_is_an_error_that_says_why(dialect, answer, why):
    with pytest.raises(WireError, match=why):
        read_answer(dialect, answer, IDS, 1, 2)
