"""The library of earlier cuts: what is added is found whole, whoever else writes or dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import sqlite3
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_run import run
from secateur.core.errors import LibraryError
from secateur.core.plan import GroupCut, PrunePlan
from secateur.vote import library as library_module
from secateur.vote import store
from secateur.vote.archive import export_entries, import_entries
from secateur.vote.entry import Entry, Facts, TaskMark, digest_of, pack
from secateur.vote.garbage import collect_garbage
from secateur.vote.library import (
    Library,
    add_entries,
    add_entry,
    find_axes,
    find_entries,
    find_id,
    find_same_cut,
    load_entry,
    open_library,
    remove_entry,
)
from secateur.vote.nearest import nearest

PLAN = PrunePlan(
    cuts=(GroupCut("stem", 4, (0, 2)), GroupCut("block", 6, (1, 2, 5))),
    macs_before=1000, macs_after=490, budget_macs=500, channel_grid=1,
    criterion="taylor", fusion="cut", lost={"depth": 0.1},
)  # fmt: skip


def make_entry(name: str = "depth", *, parent: str = "p" * 20, seed: int = 0, **facts) -> Entry:
    rng = np.random.default_rng(seed)
    told = Facts(
        parent, "zoo:net", (TaskMark(name, "depth"),), "data0", facts.pop("budget", 0.5),
        accuracy={name: {"rmse": 0.61}}, delta_t=-1.5, steps=300, recipe="model: …", **facts,
    )  # fmt: skip
    scores = {name: {"stem": rng.uniform(size=4), "block": rng.uniform(size=6)}}
    sketches = {"mean_feature": rng.normal(size=5)}
    weights = {"head.weight": rng.normal(size=(3, 2)).astype(np.float16), "seen": np.array(seed)}
    return Entry(told, PLAN, scores, sketches, weights)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return open_library(tmp_path / "library")


def test_what_is_added_is_loaded_and_found(library: Library) -> None:
    entry = make_entry(created="2026-01-02T03:04:05+00:00")
    name = add_entry(library, entry)
    loaded = load_entry(library, name)
    assert loaded.facts == entry.facts and loaded.plan == PLAN
    assert loaded.id == entry.id == name == find_id(library, name[:6])
    for group in ("stem", "block"):
        wanted = entry.scores["depth"][group].astype(np.float32)
        np.testing.assert_array_equal(loaded.scores["depth"][group], wanted)
    np.testing.assert_allclose(loaded.sketches["mean_feature"], entry.sketches["mean_feature"])
    assert loaded.weights["head.weight"].dtype == np.float16 and loaded.weights["seen"].shape == ()
    np.testing.assert_array_equal(loaded.weights["head.weight"], entry.weights["head.weight"])
    (listed,) = find_entries(library)
    assert (listed.scored, listed.with_weights, listed.sketches) == (True, True, ("mean_feature",))


def test_the_same_cut_is_one_entry_and_another_one_is_not(library: Library) -> None:
    first = make_entry(created="2026-01-01T00:00:00+00:00", version="0.1")
    again = make_entry(created="2026-02-02T00:00:00+00:00", version="0.2")
    assert add_entry(library, first) == add_entry(library, again)
    changes = [make_entry(seed=1), make_entry("depths"), make_entry(budget=0.51),
               replace(first, weights={}), replace(first, scores={}), replace(first, sketches={}),
               replace(first, plan=replace(PLAN, macs_after=480))]  # fmt: skip
    assert len({first.id, *add_entries(library, changes)}) == 8 == len(find_entries(library))


def test_conditions_narrow_what_is_found(library: Library) -> None:
    add_entries(library, [make_entry("depth"), make_entry("depth", budget=0.2),
                          make_entry("normals"), make_entry("normals", parent="q")])  # fmt: skip

    def names(**conditions) -> list[tuple[str, float]]:
        found = find_entries(library, **conditions)
        return sorted((each.facts.task_names[0], each.facts.budget) for each in found)

    assert names(parent="q") == [("normals", 0.5)]
    assert names(tasks=["depth", "edges"]) == [("depth", 0.2), ("depth", 0.5)]
    assert names(tasks=["depth"], budget=(0.4, 0.5)) == [("depth", 0.5)]
    assert names(tasks=["edges"]) == names(parent="r") == []


def test_what_is_no_entry_is_refused() -> None:
    twice = (TaskMark("a", "depth"), TaskMark("a", "depth"))
    for tasks, budget in ((twice, 0.5), ((), 0.5), (twice[:1], 0.0), (twice[:1], 1.5)):
        with pytest.raises(LibraryError, match="this is not an entry"):
            Facts("p", "net", tasks, "data", budget)
    facts = make_entry().facts
    for cut in (GroupCut("g", 4, ()), GroupCut("g", 4, (1, 1)), GroupCut("g", 4, (4,))):
        with pytest.raises(LibraryError, match="group 'g' keeps"):
            Entry(facts, replace(PLAN, cuts=(cut,)))
    with pytest.raises(LibraryError, match=r"shape \(3,\), expected \(4,\)"):
        Entry(facts, PLAN, {"depth": {"stem": np.ones(3)}})
    for bad in (np.nan, np.inf, 1e300):
        with pytest.raises(LibraryError, match="not finite"):
            Entry(facts, PLAN, sketches={"leep": np.array([bad])})


def test_removed_entries_leave_arrays_that_gc_frees(library: Library) -> None:
    kept, gone = make_entry(seed=1), make_entry(seed=2)
    add_entries(library, [kept, gone])
    remove_entry(library, gone.id)
    assert collect_garbage(library).removed == ()  # too young
    old = time.time() - 3600
    for path in library.blobs.iterdir():
        os.utime(path, (old, old))
    packed = pack(gone)
    freed = collect_garbage(library)
    assert freed.bytes == len(packed.scores or b"") + len(packed.weights or b"")
    assert len(freed.removed) == 2 and not freed.missing
    assert load_entry(library, kept.id).id == kept.id
    assert collect_garbage(library, older_than_s=0).removed == ()
    with pytest.raises(LibraryError, match="no entry"):
        remove_entry(library, gone.id)


def test_an_orphan_that_is_added_again_is_young(library: Library) -> None:
    entry = make_entry()
    add_entry(library, entry)
    remove_entry(library, entry.id)
    for path in library.blobs.iterdir():
        os.utime(path, (0, 0))
    library_module.write_blob(library, pack(entry).scores or b"")
    assert len(collect_garbage(library).removed) == 1  # the weights, which nobody wants again


def test_missing_and_altered_arrays_are_told(library: Library) -> None:
    entry = make_entry()
    add_entry(library, entry)
    scores = library.blob(digest_of(pack(entry).scores or b""))
    whole = scores.read_bytes()
    scores.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(LibraryError, match="was altered"):
        load_entry(library, entry.id)
    assert collect_garbage(library).altered == ((entry.id, scores.stem),)
    add_entry(library, entry)  # mends it
    assert not collect_garbage(library).altered
    assert load_entry(library, entry.id).id == entry.id
    scores.unlink()
    with pytest.raises(LibraryError, match="lacks its array file"):
        load_entry(library, entry.id)
    assert collect_garbage(library).missing == ((entry.id, scores.stem),)


def test_all_entries_are_added_or_none(library: Library) -> None:
    def entries():
        yield make_entry()
        raise LibraryError("the second is bad", hint="-")

    with pytest.raises(LibraryError, match="second"):
        add_entries(library, entries())
    assert find_entries(library) == []


def test_a_library_of_version_1_is_brought_up(tmp_path: Path) -> None:
    entry = make_entry()
    packed = pack(entry)
    root = tmp_path / "old"
    (root / "blobs").mkdir(parents=True)
    with sqlite3.connect(root / "index.sqlite") as old:  # as version 1 made it
        old.execute(
            "CREATE TABLE entries (id TEXT PRIMARY KEY, parent TEXT NOT NULL, basis TEXT NOT NULL,"
            " budget REAL NOT NULL, created TEXT NOT NULL, facts TEXT NOT NULL,"
            " plan TEXT NOT NULL, scores TEXT, weights TEXT)"
        )
        old.execute(
            "INSERT INTO entries VALUES (?, ?, 'original', 0.5, ?, ?, ?, NULL, NULL)",
            (packed.id, entry.facts.parent, entry.facts.created, packed.facts, packed.plan),
        )
        old.execute(f"PRAGMA application_id = {store.APPLICATION_ID}")
        old.execute("PRAGMA user_version = 1")
    old.close()
    library = open_library(root)
    assert load_entry(library, packed.id).facts == entry.facts
    add_entry(library, make_entry(seed=5))
    assert sorted(each.sketches for each in find_entries(library)) == [(), ("mean_feature",)]
    with store.connect(library.index) as index:
        assert index.execute("PRAGMA user_version").fetchone() == (store.SCHEMA_VERSION,) == (4,)
        assert index.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_migration_that_fails_changes_nothing(library: Library, monkeypatch) -> None:
    add_entry(library, make_entry())
    steps = (*store.MIGRATIONS, ("DROP TABLE sketches", "CREATE nonsense"))
    monkeypatch.setattr(store, "MIGRATIONS", steps)
    monkeypatch.setattr(store, "SCHEMA_VERSION", len(steps))
    with pytest.raises(LibraryError, match="cannot be used"):
        open_library(library.root)
    monkeypatch.undo()
    assert find_entries(open_library(library.root))[0].sketches == ("mean_feature",)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("PRAGMA user_version = 99", "schema version 99, this Secateur knows 4"),
        ("PRAGMA application_id = 7", "not the index of a library"),
        (None, "cannot be used"),
    ],
)
def test_other_peoples_files_are_left_alone(library: Library, spoil: str | None, says: str) -> None:
    if spoil is None:
        library.index.write_bytes(b"something else entirely, and long enough to be a header" * 9)
    else:
        with store.connect(library.index) as index:
            index.execute(spoil)
    before = library.index.read_bytes()
    with pytest.raises(LibraryError, match=says):
        open_library(library.root)
    assert library.index.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LibraryError, match="cannot write") as caught:
        open_library(tmp_path / "file" / "library")
    assert "SECATEUR_LIBRARY" in caught.value.hint


# Several processes -----------------------------------------------------------------------------


def keep_adding(root: Path, name: str, count: int) -> None:
    library = open_library(root)  # made by whoever comes first
    for seed in range(count):
        add_entry(library, make_entry(name, seed=seed))


def die_while_writing(root: Path, name: str, where: str) -> None:
    library = open_library(root)
    real = library_module._insert

    def die(*arguments: object) -> None:
        if where == "in the transaction":
            real(*arguments)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "in a blob":
        os.fsync = die  # type: ignore[assignment]  # before the file gets its name
    else:
        library_module._insert = die  # type: ignore[assignment]
    add_entry(library, make_entry(name))


def test_no_entry_is_lost_or_torn_by_others_or_by_a_kill(tmp_path: Path) -> None:
    root, spawn = tmp_path / "library", multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=keep_adding, args=(root, f"writer{i}", 12)) for i in range(2)]
    places = ["in a blob", "in the transaction"]
    dying = [spawn.Process(target=die_while_writing, args=(root, p.split()[-1], p)) for p in places]
    victim = spawn.Process(target=keep_adding, args=(root, "victim", 10**6))
    for process in (*writers, *dying, victim):
        process.start()
    library = open_library(root)
    deadline = time.monotonic() + 300
    while not find_entries(library, tasks=["victim"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.kill()  # at whatever it is doing
    for process in (*writers, *dying, victim):
        process.join(300)
    assert [p.exitcode for p in writers] == [0, 0]
    assert [p.exitcode for p in (*dying, victim)] == [-signal.SIGKILL] * 3

    found = find_entries(library)
    for listed in found:
        assert load_entry(library, listed.id).id == listed.id  # every array, by its digest
    wanted = {make_entry(f"writer{i}", seed=s).id for i in range(2) for s in range(12)}
    assert wanted <= {listed.id for listed in found}
    assert not find_entries(library, tasks=["blob", "transaction"])
    assert find_entries(library, tasks=["victim"])
    with store.connect(library.index) as index:
        assert index.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not index.execute("PRAGMA foreign_key_check").fetchall()
    garbage = collect_garbage(library, older_than_s=0)
    assert any(".tmp-" in name for name in garbage.removed) and not garbage.missing
    with store.connect(library.index) as index:
        named = index.execute("SELECT scores FROM entries UNION SELECT weights FROM entries")
        assert {library.blob(digest) for (digest,) in named} == set(library.blobs.iterdir())


# Archives --------------------------------------------------------------------------------------


def test_an_archive_carries_entries_to_another_library(library: Library, tmp_path: Path) -> None:
    entries = [make_entry(), make_entry("normals", seed=3), replace(make_entry(seed=4), weights={})]
    ids = add_entries(library, entries)
    assert export_entries(library, tmp_path / "some.zip", ids[:1]) == (ids[0],)
    assert sorted(export_entries(library, tmp_path / "all.zip")) == sorted(ids)
    other = open_library(tmp_path / "other")
    assert import_entries(other, tmp_path / "some.zip") == (ids[0],)
    assert sorted(import_entries(other, tmp_path / "all.zip")) == sorted(ids)
    for listed in find_entries(library):
        mine, theirs = load_entry(library, listed.id), load_entry(other, listed.id)
        assert theirs.id == mine.id and theirs.facts == mine.facts
    assert not list(tmp_path.glob(".*tmp*"))


def spoiled(source: Path, change: Callable[[dict[str, bytes]], None], compressed: bool) -> Path:
    """Return a copy of an archive with its members changed."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    path = source.with_name("spoiled.zip")
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def in_contents(old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        text = members["library.json"].decode()
        assert old in text
        members["library.json"] = text.replace(old, new, 1).encode()

    return change


def flip_a_bit(members: dict[str, bytes]) -> None:
    name = next(name for name in members if name.startswith("blobs/"))
    members[name] = members[name][:-1] + bytes([members[name][-1] ^ 1])


def drop_a_blob(members: dict[str, bytes]) -> None:
    del members[next(name for name in members if name.startswith("blobs/"))]


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("was-unpickled",))


def pickle_a_blob(members: dict[str, bytes]) -> None:
    name = next(name for name in members if name.startswith("blobs/"))
    data = pickle.dumps(Payload())
    del members[name]
    members[f"blobs/{digest_of(data)}.safetensors"] = data
    digest = name[len("blobs/") : -len(".safetensors")]
    in_contents(digest, digest_of(data))(members)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update({"../../evil": b"x"}), r"it holds '../../evil'"),
        (lambda m: m.update({"/etc/evil": b"x"}), "it holds '/etc/evil'"),
        (lambda m: m.update({"blobs/../../x.safetensors": b"x"}), "it holds 'blobs/../../x"),
        (lambda m: m.pop("library.json"), "a file lacks or is double"),
        (lambda m: m.update({"library.json": b"["}), "library.json: Invalid JSON"),
        (lambda m: m.update({"library.json": b"[" * 100_000}), "library.json: Invalid JSON"),
        (lambda m: m.update({"library.json": b"\xff"}), "cannot be read"),
        (in_contents('"schema_version": 4', '"schema_version": 5'), "of schema version 5"),
        (in_contents('"secateur library"', '"other"'), "it is a 'other'"),
        (in_contents('"steps": 300', '"steps": "many"'), "steps: Input should be a valid integer"),
        (in_contents('"steps": 300', '"steps": 301'), "was altered: its content has id"),
        (in_contents('"steps": 300', '"step": 300'), "step: Unexpected keyword argument"),
        (in_contents('"kept": [0, 2]', '"kept": [0, 9]'), "group 'stem' keeps"),
        (flip_a_bit, "was altered"),
        (drop_a_blob, "is missing"),
        (pickle_a_blob, "cannot be read"),
    ],
)
def test_a_bad_archive_adds_nothing(
    library: Library, tmp_path: Path, monkeypatch, change, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    add_entries(library, [make_entry(), make_entry(seed=1)])
    export_entries(library, tmp_path / "good.zip")
    other = open_library(tmp_path / "deep" / "down" / "other")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LibraryError, match=says):
        import_entries(other, spoiled(tmp_path / "good.zip", change, compressed=False))
    assert find_entries(other) == []
    assert not [path for path in {*tmp_path.rglob("*")} - {*before}
                if path.name != "spoiled.zip" and path.parent != other.blobs]  # fmt: skip


def test_an_archive_that_could_unfold_or_is_none_is_refused(
    library: Library, tmp_path: Path
) -> None:
    add_entry(library, make_entry())
    export_entries(library, tmp_path / "good.zip")
    packed = spoiled(tmp_path / "good.zip", lambda members: None, compressed=True)
    with pytest.raises(LibraryError, match="compressed, expected stored"):
        import_entries(library, packed)
    (tmp_path / "none.zip").write_bytes(b"no zip")
    for path in (tmp_path / "none.zip", tmp_path / "absent.zip"):
        with pytest.raises(LibraryError, match="cannot be read"):
            import_entries(library, path)
    with pytest.raises(LibraryError, match="cannot write"):
        export_entries(library, tmp_path / "good.zip" / "x.zip")


# Nearest ---------------------------------------------------------------------------------------


def with_mean(name: str, mean: list[float], **facts) -> Entry:
    return replace(make_entry(name, **facts), sketches={"mean_feature": np.array(mean)})


def test_nearest_orders_explains_and_refuses(library: Library) -> None:
    far, near, middle = (
        with_mean("far", [-1, 0, 0]), with_mean("near", [3, 0.1, 0]), with_mean("mid", [1, 1, 0])
    )  # fmt: skip
    other = with_mean("other", [1, 0, 0], parent="q" * 20)
    turned = with_mean("turned", [1, 0, 0], basis="axes-1")
    long = with_mean("long", [1, 0, 0, 0])
    bare = replace(make_entry("bare"), sketches={})
    small = with_mean("small", [1, 0, 0], budget=0.1)
    add_entries(library, [far, near, middle, other, turned, long, bare, small])
    own = {"mean_feature": np.array([1.0, 0, 0])}
    result = nearest(library, own, "p" * 20, "mean_feature", 2, budget=(0.4, 0.6))
    assert [each.facts.task_names for each in result.neighbours] == [("near",), ("mid",)]
    assert result.neighbours[1].similarity == pytest.approx(0.5**0.5)
    assert "0.707 (-1..1)" in result.neighbours[1].why
    refused = {each.id: each.why for each in result.refused}
    assert refused.keys() == {other.id, turned.id, long.id, bare.id}
    assert "another parent (qqqq" in refused[other.id]
    assert "other axes (axes-1" in refused[turned.id]
    assert "shape (4,), yours (3,)" in refused[long.id]
    assert "holds no 'mean_feature' sketch" in refused[bare.id]
    skipped = nearest(library, own, "p" * 20, "mean_feature", 9, skip=[near.id, small.id])
    assert [each.id for each in skipped.neighbours] == [middle.id, far.id]
    with pytest.raises(LibraryError, match="no 'leep' sketch"):
        nearest(library, own, "p" * 20, "leep", 2)
    with pytest.raises(LibraryError, match="not a measure"):
        nearest(library, own, "p" * 20, "magic", 2)


def test_axes_travel_with_their_cut_and_the_most_used_come_first(
    library: Library, tmp_path: Path
) -> None:
    entries = [
        replace(make_entry(basis=basis, seed=seed), axes={"stem": np.eye(4) * (1 + len(basis))})
        for seed, basis in enumerate(("a", "bb", "bb"))
    ]
    add_entries(library, [*entries, make_entry(basis="ccc", seed=9)])  # of these none are known
    assert [*find_axes(library, "p" * 20)] == ["bb", "a"] and find_axes(library, "q" * 20) == {}
    export_entries(library, tmp_path / "all.zip")
    other = open_library(tmp_path / "other")
    import_entries(other, tmp_path / "all.zip")
    for basis, names in find_axes(other, "p" * 20).items():
        for name in names:
            axes = load_entry(other, name).axes["stem"]
            assert axes.dtype == np.float64 and axes[0, 0] == 1 + len(basis)
    assert find_axes(library, "p" * 20, (0.0, 1e-6)) == {}
    assert not collect_garbage(library, older_than_s=0).removed


def test_features_of_other_images_are_no_likeness(library: Library) -> None:
    features = {"cka": np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)}
    base = make_entry()
    same, other = (
        replace(base, facts=replace(base.facts, data=data), sketches=features) for data in "ab"
    )
    add_entries(library, [same, other])
    found = nearest(library, features, base.facts.parent, "cka", 9, data="a")
    assert [each.id for each in found.neighbours] == [same.id]
    assert [(r.id, r.why) for r in found.refused] == [
        (other.id, "its features are of other images")
    ]


def test_a_cut_is_known_again_whatever_else_its_entry_holds(library: Library) -> None:
    full = make_entry()
    bare = replace(full, scores={}, weights={}, facts=replace(full.facts, recipe="# as built"))
    assert find_same_cut(library, bare) is None
    add_entries(library, [bare, full])
    assert find_same_cut(library, bare) == full.id  # the one with arrays
    shorter = replace(full.plan.cuts[0], kept=full.plan.cuts[0].kept[:1])
    other = replace(full, plan=replace(full.plan, cuts=(shorter, *full.plan.cuts[1:])))
    assert find_same_cut(library, other) is None


def test_ten_thousand_entries_are_searched_within_a_second(library: Library) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.uniform(size=(10_000, 64)).astype(np.float32)
    base = make_entry()
    plain, sketch = pack(base), pack(replace(base, sketches={"score_cosine": vectors[0]}))
    head = sketch.sketches["score_cosine"][: -vectors[0].nbytes]
    rows = [(f"{i:020x}", base.facts.parent, plain.facts, plain.plan) for i in range(10_000)]
    with store.connect(library.index) as index, store.transaction(index):
        index.executemany(
            "INSERT INTO entries (id, parent, basis, budget, created, facts, plan) "
            "VALUES (?, ?, 'original', 0.5, '', ?, ?)", rows
        )  # fmt: skip
        index.executemany(
            "INSERT INTO sketches VALUES (?, 'score_cosine', ?)",
            [(row[0], head + v.tobytes()) for row, v in zip(rows, vectors, strict=True)],
        )
    own = {"score_cosine": vectors[4321]}
    start = time.process_time()  # not the wall's: other programs may be at work
    found = nearest(library, own, base.facts.parent, "score_cosine", 5)
    seconds = time.process_time() - start
    assert len(find_entries(library)) == 10_000
    assert time.process_time() - start < 3.0
    assert found.neighbours[0].id == f"{4321:020x}" and not found.refused
    assert found.neighbours[0].similarity == pytest.approx(1.0)
    assert seconds < 1.0


# The command line ------------------------------------------------------------------------------


def ids_of(out: str) -> list[str]:
    return [each["id"] for each in json.loads(out)]


def test_the_command_line_lists_shows_carries_and_cleans(capsys, tmp_path: Path) -> None:
    library = open_library()  # the folder of SECATEUR_LIBRARY
    assert library.root == tmp_path / "library"
    near, far = with_mean("near", [1, 0.2]), with_mean("far", [1, 2])
    add_entries(library, [near, far, with_mean("own", [1, 0]), with_mean("[b]x", [1], parent="q")])
    own = find_entries(library, tasks=["own"])[0].id
    code, out, _ = run(capsys, "library", "list", "--json", "--task", "near", "--budget", "0.51")
    assert code == 0 and ids_of(out) == [near.id]
    code, out, _ = run(capsys, "library", "list")
    assert code == 0 and near.id[:8] in out and "[b]x" in out
    code, out, _ = run(capsys, "library", "list", "--json", "--parent", "q")
    assert len(ids_of(out)) == 1  # a fingerprint's beginning
    assert "no entry meets" in run(capsys, "library", "list", "--parent", "zz")[1]
    code, out, _ = run(capsys, "library", "show", near.id[:8], "--json")
    shown = json.loads(out)
    assert (shown["id"], shown["weights"]["tensors"]) == (near.id, 2)
    assert shown["plan"]["cuts"][0]["kept"] == [0, 2] and shown["scores"] == {
        "near": ["block", "stem"]
    }
    code, out, _ = run(capsys, "library", "show", near.id)
    assert code == 0 and "-1.50 % after 300" in out and "stem" in out
    words = ("library", "nearest", own, "--measure", "mean_feature")
    code, out, _ = run(capsys, *words, "--json", "--count", "1")
    result = json.loads(out)
    assert code == 0 and [each["id"] for each in result["neighbours"]] == [near.id]
    assert len(result["refused"]) == 1
    code, out, _ = run(capsys, *words)
    assert code == 0 and "cosine of 0.981" in out and "another parent" in out
    assert run(capsys, "library", "export", tmp_path / "a.zip", near.id[:8])[0] == 0
    code, out, _ = run(capsys, "library", "import", tmp_path / "a.zip",
                       "--library", tmp_path / "new", "--json")  # fmt: skip
    assert code == 0 and json.loads(out) == {"entries": [near.id]}
    assert run(capsys, "library", "remove", near.id[:8])[0] == 0
    code, out, _ = run(capsys, "library", "gc", "--older-than", "0", "--json")
    assert code == 0 and len(json.loads(out)["removed"]) == 1  # far has the same weights
    for path in library.blobs.iterdir():
        path.unlink()
    assert run(capsys, "library", "gc")[0] == 1
    (library.blobs / "mine").mkdir()
    code, _, err = run(capsys, "library", "gc", "--older-than", "0")
    assert code == 2 and "cannot remove" in err and "mine" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("show", "abc"), "no entry 'abc'"),
        (("show", ""), "no entry ''"),
        (("nearest", "abc"), "no entry 'abc'"),
        (("import", "absent.zip"), "absent.zip is not imported"),
        (("add", "absent"), "absent is not a bundle"),
    ],
)
def test_mistakes_are_one_sentence_and_a_hint(capsys, words, says: str) -> None:
    code, out, err = run(capsys, "library", *words)
    assert code == 2 and says in err.replace("\n", " ") and "hint:" in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    "words",
    [
        ("list",),
        ("show", "abc"),
        ("nearest", "abc"),
        ("export", "a.zip"),
        ("remove", "abc"),
        ("gc",),
    ],
)
def test_a_mistyped_folder_is_told_and_not_made(capsys, tmp_path: Path, words) -> None:
    folder = tmp_path / "mistyped"
    code, _, err = run(capsys, "library", *words, "--library", folder)
    assert code == 2 and f"no library in {folder}" in err.replace("\n", "") and not folder.exists()


def make_bundle(folder: Path, recipe: str) -> Path:
    """Write a bundle whose model is a few bytes."""
    from secateur.bundle.manifest import SCHEMA_VERSION, Manifest
    from secateur.bundle.write import file_records, write_bundle

    folder.mkdir()
    for name in ("model.onnx", "run.py", "check.npz"):
        (folder / name).write_text(name)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "plan.json").write_text(json.dumps(PLAN.to_json()))
    cost = {"macs": 1000, "params": 10, "onnx_bytes": 10}
    metrics = {"depth": {"rmse": 0.6}}
    accuracy = {
        "images": 8, "parent": metrics, "before_recovery": metrics, "shipped": metrics,
        "change_percent": {"depth": -1.0}, "delta_t": -1.0, "delta_t_before_recovery": -2.0,
        "worst_task": "depth",
    }  # fmt: skip
    manifest = Manifest.model_validate({
        "schema_version": SCHEMA_VERSION, "created": "2026-01-01T00:00:00+00:00",
        "device": "x86-64-cpu", "precision": "fp32", "runtime": "onnxruntime", "threads": 1,
        "input": {"name": "image", "channels": 3, "height": 8, "width": 8, "mean": [0.0],
                  "std": [1.0], "layout": "RGB"},
        "tasks": [{"name": "depth", "kind": "depth", "classes": None, "ignore_index": 255,
                   "max_drop": None, "shape": [1, 8, 8]}],
        "files": file_records(folder), "parent": {"factory": "zoo:net", "fingerprint": "f" * 20},
        "data": {"train": "t" * 20, "eval": "e" * 20}, "plan": {"recovery_steps": 120},
        "cost_parent": cost, "cost": cost, "accuracy": accuracy, "parity": {}, "latency_ms": {},
        "seconds": {}, "versions": {"secateur": "0.1.0"}, "host": {}, "command": "",
        "recipe": recipe,
    })  # fmt: skip
    write_bundle(folder, manifest)
    return folder


@pytest.mark.parametrize(
    ("recipe", "basis"),
    [("prune: {axes: original}", "original"), ("prune: {axes: balanced}", "unstated"),
     ("keep: [depth]", "unstated")],
)  # fmt: skip
def test_a_bundle_is_added_once(capsys, tmp_path: Path, recipe: str, basis: str) -> None:
    bundle = make_bundle(tmp_path / "bundle", recipe)
    for added in (True, False):
        code, out, _ = run(capsys, "library", "add", bundle, "--json")
        assert code == 0 and json.loads(out)["added"] is added
    (listed,) = find_entries(open_library())
    entry = load_entry(open_library(), listed.id)
    assert entry.plan == PLAN and entry.facts.basis == basis
    assert entry.facts.parent == "f" * 20 and entry.facts.data == "t" * 20
    assert (entry.facts.budget, entry.facts.steps, entry.facts.delta_t) == (0.5, 120, -1.0)
    assert entry.facts.tasks == (TaskMark("depth", "depth"),) and entry.facts.recipe == recipe
    assert not entry.scores and not entry.sketches and not entry.weights


def test_an_altered_bundle_is_not_added(capsys, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", "keep: [depth]")
    (bundle / "plan.json").write_text(json.dumps(replace(PLAN, macs_after=400).to_json()))
    assert run(capsys, "library", "add", bundle)[0] == 1
    assert find_entries(open_library()) == []
