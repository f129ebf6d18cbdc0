"""FineWeb from a hub that stalls, resets, throttles and truncates: every token once and in order, whatever comes."""

from __future__ import annotations

import io
import random
import signal
from collections import Counter

import pytest

from qat.data import token_cache
from qat.data.heldout import HELDOUT_LENGTH
from qat.models.tokenizer import byte_tokenizer
from tests.conftest import wait_for
from tests.helpers.hub import COMMIT, FAULTS, Hub, Request
from tests.helpers.streaming import Streamer

NAME, SUBSET = "HuggingFaceFW/fineweb", "sample-10BT"
CARD = """---
configs:
- {config_name: default, data_files: [{split: train, path: data/*/*}]}
- {config_name: sample-10BT, data_files: [{split: train, path: sample/10BT/*}]}
- {config_name: wordless, data_files: [{split: train, path: wordless/*}]}
---
"""
FILES, GROUPS, ROWS = 2, 12, 10
HELDOUT = 15  # documents held out, by `tests.helpers.streaming`
EPOCH = 60  # micro-batches, about
BATCHES = 66  # more than an epoch has
CFG = {"path": NAME, "subset": SUBSET, "shuffle_buffer": 25}
CACHED = CFG | {"cache": True}


def text(number: int) -> str:
    number = 3 if number == 77 else number  # a copy of held-out text
    return f"document {number} " + "".join(random.Random(number).choices("etaoin shrdlu", k=120))


def parquet(part: int, column: str = "text") -> bytes:
    """Six row groups, and a footer too long to come along with one of them: FineWeb's are."""
    import pyarrow
    import pyarrow.parquet

    texts = [text(part * GROUPS * ROWS + row) for row in range(GROUPS * ROWS)]
    table = pyarrow.table({column: texts, "url": [f"http://{row}" for row in range(len(texts))]})
    file = io.BytesIO()
    padded = table.replace_schema_metadata({"padding": "x" * 70_000})
    pyarrow.parquet.write_table(padded, file, row_group_size=ROWS)
    return file.getvalue()


@pytest.fixture(scope="module")
def running():
    parts = {f"sample/10BT/00{part}_00000.parquet": parquet(part) for part in range(FILES)}
    others = {"data/CC/0.parquet": parquet(9), "wordless/0.parquet": parquet(0, "words")}
    with Hub(NAME, {"README.md": CARD.encode(), **parts, **others}) as hub:
        yield hub


@pytest.fixture
def hub(running):
    running.requests.clear()
    yield running
    running.commits, running.fault = [COMMIT], lambda request: None


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def streamers(running, cache, tmp_path_factory):
    """Two processes with one token cache."""
    folder = tmp_path_factory.mktemp("streamers")
    made = [Streamer(running.url, folder / f"home{number}", cache) for number in range(2)]
    yield made
    for each in made:
        each.process.kill()


@pytest.fixture
def ask(streamers):
    """ask(**work): the answer of a process that remembers nothing, with options of the data in `cfg`."""

    def answer(cfg: dict | None = None, **work) -> dict:
        return streamers[0].answer(cfg=CFG | (cfg or {}), **work)

    return answer


@pytest.fixture(scope="module")
def whole(running, streamers):
    """Return what an undisturbed stream yields."""
    done = streamers[0].answer(cfg=CFG, batches=BATCHES, heldout=1000)
    assert done["error"] is None and done["said"] == ""
    assert done["states"][BATCHES]["epoch"] == 1
    return done


def documents(batches: list) -> list[str]:
    """The whole documents of batches."""
    tokens = [token for batch in batches for sequence in batch for token in sequence]
    return byte_tokenizer().decode(tokens).split("<|endoftext|>")[1:-1]


def row_groups(hub: Hub) -> Counter:
    """Return how often the text of each row group was fetched by itself, as (file, first byte)."""
    import pyarrow.parquet

    begins = set()
    for name in hub.files:
        if name.startswith("sample/"):
            footer = pyarrow.parquet.read_metadata(io.BytesIO(hub.files[name]))
            columns = [footer.row_group(group).column(0) for group in range(GROUPS)]
            begins |= {(name, column.dictionary_page_offset or column.data_page_offset) for column in columns}
    asked = [(request.path.partition(f"/{COMMIT}/")[2], request.start) for request in hub.requests]
    return Counter(each for each in asked if each in begins)


def once_each(kind: str | None, seen: set):
    """A fault of every request when it comes for the first time."""

    def fault(request: Request) -> str | None:
        new = request not in seen
        seen.add(request)
        return kind if new else None

    return fault


# --------------------------------------------------------------------------------------------------------- its order


def test_an_epoch_has_every_document_once_but_for_those_held_out_and_their_copies(whole):
    everything = {text(number) for number in range(FILES * GROUPS * ROWS)}
    held_out = {text(number) for number in range(HELDOUT)}
    found = documents(whole["batches"])
    epoch = len(everything - held_out)
    assert epoch == FILES * GROUPS * ROWS - HELDOUT - 1
    assert set(found[:epoch]) == everything - held_out and len(set(found[epoch:])) == len(found[epoch:])
    assert found[:epoch] != sorted(found[:epoch], key=lambda each: int(each.split()[1]))
    heldout = documents([whole["heldout"]])
    assert heldout == [text(number)[:HELDOUT_LENGTH] for number in range(len(heldout))] and len(heldout) > 3


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if FAULTS[kind] not in (403, 404)])
def test_when_every_request_fails_once_no_token_is_lost_or_doubled(whole, hub, ask, kind):
    failed = set()
    hub.fault = once_each(kind, failed)
    done = ask(batches=BATCHES, heldout=1000, **({"silence": 0.2} if kind == "stall" else {}))
    assert done["error"] is None and len(failed) > 25
    assert done["batches"] == whole["batches"] and done["heldout"] == whole["heldout"]
    if FAULTS[kind]:
        assert done["said"].count("next try at") > 10 and "is read, after" in done["said"]


def test_an_outage_is_waited_for_and_said_line_by_line(whole, hub, ask):
    count = iter(range(10**6))
    hub.fault = lambda request: "down" if 40 <= next(count) < 60 else None
    done = ask(batches=BATCHES)
    assert done["batches"] == whole["batches"]
    tried, back = (
        [line for line in done["said"].splitlines() if words in line] for words in ("next try at", "is read, after")
    )
    assert len(tried) > 3 and len(back) > 0
    assert all(line.startswith(f"warning: {NAME}: row group ") and "503" in line for line in tried)


def test_after_the_hours_a_run_ends_and_says_how_to_go_on(hub, ask):
    count = iter(range(10**6))
    hub.fault = lambda request: "down" if next(count) > 40 else None
    said = ask({"retry_hours": 0.0001}, batches=BATCHES)["error"]
    assert said.startswith(f"data.path={NAME}: row group ") and "\n" not in said
    assert "could not be read for 0.0001 hours (Server error '503" in said
    assert said.endswith("the same command continues from the last checkpoint")


@pytest.mark.parametrize("first", [0, 5, 20, 40])
@pytest.mark.parametrize("kind", ["denied", "gone"])
def test_what_will_not_get_better_is_said_at_once(hub, ask, kind, first):
    count = iter(range(10**6))
    hub.fault = lambda request: kind if next(count) >= first and request.method == "GET" else None
    done = ask(batches=BATCHES)
    assert done["said"] == "" and "\n" not in done["error"]
    assert done["error"].startswith(f"data.path={NAME}: cannot be streamed (")
    assert done["error"].endswith("); or use data=embedded") and str(FAULTS[kind]) in done["error"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"path": "nobody/nothing"}, "404"),
        ({"revision": "v2"}, "404"),
        ({"subset": "sample-10TB"}, "BuilderConfig 'sample-10TB' not found"),
        ({"subset": "wordless"}, "it has no column named text"),
    ],
)
def test_a_data_set_that_is_not_there_is_said_at_once(hub, ask, changes, reason):
    done = ask(changes, batches=1)
    assert done["said"] == "" and "\n" not in done["error"]
    assert "cannot be streamed (" in done["error"] and reason in done["error"]


# ------------------------------------------------------------------------------------------------------------- resume


def test_a_resume_anywhere_yields_the_rest_for_the_same_bytes(whole, hub, ask):
    sent = []
    for number in range(0, BATCHES, 6):
        hub.requests.clear()
        assert ask(batches=1, state=whole["states"][number])["batches"] == [whole["batches"][number]]
        assert len(row_groups(hub)) <= 12  # of 24: held-out text, a block of three, and what is read ahead
        sent.append(sum(request.sent for request in hub.requests))
    assert max(sent) < 2 * min(sent)
    for number in (11, 37, 58):
        assert ask(batches=BATCHES - number, state=whole["states"][number])["batches"] == whole["batches"][number:]


def test_a_run_stays_on_the_revision_it_has_begun_with(whole, hub, ask):
    hub.commits.append("f" * 40)
    done = ask(batches=3, state=whole["states"][9])
    assert done["batches"] == whole["batches"][9:12]
    assert not any("f" * 40 in request.path for request in hub.requests)
    fresh = ask(batches=1)
    assert fresh["states"][1]["corpus"]["revision"] == "f" * 40
    assert ask({"revision": COMMIT}, batches=1)["states"][1]["corpus"]["revision"] == COMMIT


# -------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture(scope="module")
def filled(running, streamers):
    """(what two processes that fill the cache yield, the row groups that they read)"""
    running.requests.clear()
    for each in streamers:
        each.start(cfg=CACHED, batches=EPOCH - 15, heldout=1000)
    return [each.result() for each in streamers], row_groups(running)


def test_processes_share_a_cache_that_reads_each_row_group_once(whole, filled):
    found, times = filled
    assert found[0]["batches"] == found[1]["batches"] == whole["batches"][: EPOCH - 15]
    assert found[0]["heldout"] == found[1]["heldout"] == whole["heldout"]
    assert times.pop(("sample/10BT/000_00000.parquet", 4)) == 2  # held-out text and trained on
    assert len(times) > 15 and sum(times.values()) <= len(times) + 1


def test_what_is_cached_needs_no_hub(whole, filled, hub, streamers):
    hub.fault = lambda request: "denied"
    for each in streamers:
        done = each.answer(cfg=CACHED, batches=EPOCH - 15, heldout=1000)
        assert done["batches"] == whole["batches"][: EPOCH - 15] and done["heldout"] == whole["heldout"]
        assert done["said"] == ""


@pytest.mark.parametrize("number", [0, 1, 14, 33])
def test_a_run_may_turn_to_the_cache_and_away_from_it(whole, ask, number):
    cached = ask({"cache": True}, batches=number)["states"][-1]
    for state in (cached, whole["states"][number]):
        for cache in (False, True):
            assert ask({"cache": cache}, batches=3, state=state)["batches"] == whole["batches"][number : number + 3]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("change", [{"shards": 23}, {"order": 1}])
def test_a_cursor_into_another_text_or_order_is_refused(whole, ask, change, cached):
    state = dict(whole["states"][9])
    state["corpus"] = state["corpus"] | change
    done = ask({"cache": cached}, batches=1, state=state)
    assert done["error"].startswith(f"data.path={NAME}: the text or its order has changed since the checkpoint (")
    assert "\n" not in done["error"] and done["batches"] == []


def test_runs_of_other_seeds_and_orders_read_what_is_cached(whole, hub, ask):
    assert ask({"cache": True}, batches=BATCHES)["error"] is None  # the rest of the epoch
    hub.requests.clear()
    done = ask({"cache": True, "shuffle_buffer": 40}, batches=EPOCH - 15, seed=1)
    assert hub.requests == [] and done["error"] is None
    known = set(documents(whole["batches"]))
    found = documents(done["batches"])
    assert found != documents(whole["batches"])[: len(found)]
    assert len(set(found)) == len(found) > 100 and set(found) <= known


@pytest.mark.parametrize("damage", ["cut", "directory", "middle", "empty"])
def test_a_damaged_block_is_made_again(whole, hub, ask, cache, damage):
    assert ask({"cache": True}, batches=EPOCH)["error"] is None
    hub.requests.clear()
    damaged = sorted(cache.glob(f"tokens/*/{COMMIT}/*/*.npz"))[2]
    content = damaged.read_bytes()
    half = len(content) // 2
    damages = {"cut": content[:half], "directory": content[:-40] + bytes(40), "empty": b""}
    damages["middle"] = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
    damaged.write_bytes(damages[damage])
    done = ask({"cache": True}, batches=EPOCH)
    assert done["batches"] == whole["batches"][:EPOCH]
    assert done["said"].count(f"{damaged} is damaged and made again") == 1 and damaged.read_bytes() == content
    assert sum(row_groups(hub).values()) == 1


@pytest.mark.parametrize("content", ["", '{"newest": "abc', "[]"])
def test_facts_of_the_cache_that_are_cut_are_asked_for_again(tmp_path, capsys, content):
    def ask() -> str:
        return token_cache.fact(tmp_path, "newest", lambda: "a commit", "it")

    assert ask() == "a commit" == token_cache.fact(tmp_path, "newest", pytest.fail, "it")
    file = tmp_path / "facts.json"
    whole = file.read_text()
    file.write_text(content)
    assert ask() == "a commit" and file.read_text() == whole
    assert capsys.readouterr().out == f"warning: {file} is damaged and made again\n"


def test_a_hub_that_refuses_is_said_by_a_run_that_fills_the_cache(hub, ask, tmp_path):
    hub.fault = lambda request: "denied" if request.start is not None else None
    done = ask({"cache": True}, batches=1, cache=str(tmp_path))
    assert "cannot be streamed (Client error '403" in done["error"] and "\n" not in done["error"]
    hub.fault = lambda request: None
    assert len(ask({"cache": True}, batches=1, cache=str(tmp_path))["batches"]) == 1


def test_another_process_fills_on_when_the_first_is_stopped_in_an_outage(hub, streamers, cache, tmp_path):
    work = {"cfg": CACHED, "batches": 1, "cache": str(tmp_path)}  # empty: whoever comes first fills it
    first, second = streamers
    done = first.answer(**work)
    hub.requests.clear()
    hub.fault = lambda request: "down"
    first.start(**work | {"batches": BATCHES})
    wait_for(lambda: bool(hub.requests))
    first.process.send_signal(signal.SIGINT)
    assert first.process.wait(180) != 0
    hub.fault = lambda request: None
    rest = second.answer(**work | {"batches": BATCHES})
    assert rest["batches"][0] == done["batches"][0] and len(rest["batches"]) == BATCHES
    epoch = documents(rest["batches"])[: FILES * GROUPS * ROWS - HELDOUT - 1]
    assert len(set(epoch)) == len(epoch)
    assert second.close() == 0
    streamers[:] = [Streamer(hub.url, tmp_path / f"home{number}", cache) for number in range(2)]  # for other tests
