"""Asking the user: on both eras where the client can, by an explicit confirm where it cannot; a no starts nothing."""

import pytest
from mcp import Client
from mcp_types import ElicitResult

from opd_mcp.planning.confirmation import Question
from opd_mcp.server.app import build_server
from opd_mcp.server.serve import ServerSettings

pytestmark = pytest.mark.anyio

START = ("start_distillation", {"plan_id": "plan-1"})
DELETE = ("delete_artifact", {"artifact_id": "model-1"})


class User:
    """Answers questions the same way each time and remembers them."""

    def __init__(self, action: str, agreed: bool = True) -> None:
        self.asked: list[str] = []
        self._result = ElicitResult(action=action, content={"agreed": agreed} if action == "accept" else None)

    async def answer(self, context, params) -> ElicitResult:
        self.asked.append(params.message)
        return self._result


@pytest.fixture(params=["auto", "legacy"])
def mode(request):
    return request.param


@pytest.fixture
def expensive(service):
    service.question = Question("plan-1", "The plan takes about 40 hours. Start plan-1?")
    return service


def server(service):
    return build_server(service, ServerSettings(allow_delete=True))


async def called(service, mode, call, user=None, **more):
    async with Client(server(service), mode=mode, elicitation_callback=user.answer if user else None) as client:
        return await client.call_tool(call[0], call[1] | more)


async def test_a_yes_starts_the_run_after_one_question(expensive, mode):
    user = User("accept")
    result = await called(expensive, mode, START, user)
    assert not result.is_error
    assert user.asked == ["The plan takes about 40 hours. Start plan-1?"]
    assert [name for name, _ in expensive.calls] == ["start_distillation"]


@pytest.mark.parametrize("user", [User("decline"), User("cancel"), User("accept", agreed=False)])
async def test_anything_but_a_yes_starts_nothing(expensive, mode, user):
    result = await called(expensive, mode, START, user)
    assert result.is_error
    assert "[declined]" in result.content[0].text
    assert not expensive.calls


async def test_a_client_that_cannot_ask_is_told_what_to_confirm(expensive, mode):
    result = await called(expensive, mode, START)
    assert result.is_error
    for part in ("[confirm_needed]", "40 hours", "confirm='plan-1'"):
        assert part in result.content[0].text
    assert not expensive.calls
    assert not (await called(expensive, mode, START, confirm="plan-1")).is_error


async def test_an_explicit_confirm_is_not_asked_about_again(expensive, mode):
    user = User("decline")
    assert not (await called(expensive, mode, START, user, confirm="plan-1")).is_error
    assert not user.asked


async def test_a_confirm_of_something_else_is_an_error(expensive, mode):
    result = await called(expensive, mode, START, User("accept"), confirm="plan-2")
    assert "[confirm_needed]" in result.content[0].text
    assert "plan-1" in result.content[0].text
    assert not expensive.calls


async def test_what_is_cheap_is_not_asked_about(service, mode):
    user = User("decline")
    assert not (await called(service, mode, START, user)).is_error
    assert not user.asked


async def test_bad_arguments_are_told_before_any_question(expensive, mode):
    user = User("accept")
    result = await called(expensive, mode, START, user, plan="x")
    assert "[unknown_argument]" in result.content[0].text
    assert not user.asked


async def test_deletion_always_asks(service, mode):
    user = User("accept")
    assert not (await called(service, mode, DELETE, user)).is_error
    assert user.asked == ["Delete model-1?"]
    assert (await called(service, mode, DELETE)).is_error
    assert not (await called(service, mode, DELETE, confirm="model-1")).is_error


async def test_deleting_a_run_asks_with_all_that_goes_with_it(service, mode):
    call, user = ("delete_run", {"run_id": "run-1"}), User("accept")
    assert not (await called(service, mode, call, user)).is_error
    assert user.asked == ["Delete run-1 with model-1?"]
    refused = await called(service, mode, call)
    assert "confirm='run-1'" in refused.content[0].text
    deleted = await called(service, mode, call, confirm="run-1")
    assert deleted.structured_content["artifacts"] == ["model-1"]
    assert "deleted with it: model-1" in deleted.content[0].text


async def test_a_sweep_asks_by_its_total_cost(service, mode):
    service.question = Question("sweep-1", "The 9 runs take about 40 hours. Start sweep-1?")
    call = ("sweep", {"cache_id": "cache-1", "points": [{"distill.steps": 1}]})
    assert "confirm='sweep-1'" in (await called(service, mode, call)).content[0].text
    assert not service.calls
    assert not (await called(service, mode, call, confirm="sweep-1")).is_error


async def test_without_allow_delete_there_is_no_such_tool(service):
    async with Client(build_server(service)) as client:
        assert "delete_artifact" not in {tool.name for tool in (await client.list_tools()).tools}


async def test_an_upload_asks_before_anything_leaves_the_machine(service, mode):
    service.question = Question("hub:me/mine", "Upload run-1 (3 GB) to a new private repository, hub:me/mine?")
    call = ("export_student", {"model": "run-1", "destination": "hub:me/mine"})
    assert "confirm='hub:me/mine'" in (await called(service, mode, call)).content[0].text
    assert not service.calls
    assert not (await called(service, mode, call, confirm="hub:me/mine")).is_error
