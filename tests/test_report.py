"""The page about a folder of bundles: what it says, that it is safe, how a browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cli_run import run
from hypothesis import given
from hypothesis import strategies as st
from secateur.bench.charts import HEIGHT, WIDTH, Candidate, Layer, pareto_front, scatter, skyline
from secateur.bench.wording import count, megabytes, percent, plain, rounded_percent
from secateur.bundle.layers import layer_tasks
from secateur.flow.report import report

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Collects tags with their attributes, text, and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))


def change(bundle: Path, **fields: Any) -> None:
    """Replace parts of a manifest."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in fields.items():
        if isinstance(value, dict) and manifest[name] is not None:
            manifest[name].update(value)
        else:
            manifest[name] = value
    path.write_text(json.dumps(manifest))


@pytest.fixture
def folder(bundle: Path, tmp_path: Path) -> Path:
    """A folder with two bundles of one parent: as built, and one that says to be another's."""
    out = tmp_path / "out"
    shutil.copytree(bundle, out / "x86-64-cpu/fp32")
    second = Path(shutil.copytree(bundle, out / "raspberry-pi-5/fp32"))
    change(second, device="raspberry-pi-5", accuracy={"too_low": ["depth"]})
    manifest = json.loads((second / "manifest.json").read_text())
    (second / "manifest.json").write_text(json.dumps({**manifest, "latency_ms": {}}))
    return out


def page_of(folder: Path) -> Page:
    report(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_tells_accuracy_cost_plan_and_provenance(bundle: Path, capsys) -> None:
    code, stdout, _ = run(
        capsys, "report", bundle.parent, "--out", bundle.parent / "r.html", "--json"
    )
    assert code == 0 and json.loads(stdout)["bundles"] == ["bundle"]
    page = Page((bundle.parent / "r.html").read_text(encoding="utf-8"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    for task, metrics in manifest["accuracy"]["shipped"].items():
        for metric, value in metrics.items():
            assert metric in page.text and plain(value) in page.text
            assert plain(manifest["accuracy"]["parent"][task][metric]) in page.text
        assert percent(manifest["accuracy"]["change_percent"][task]) in page.text
    assert count(manifest["cost"]["macs"]) in page.text
    assert megabytes(manifest["cost"]["onnx_bytes"]) in page.text
    assert all(file["sha256"] in page.text for file in manifest["files"].values())
    assert manifest["parent"]["fingerprint"] in page.text and "torch" in page.text
    assert "eval root" not in page.text  # a path of the builder's own
    cuts = json.loads((bundle / "plan.json").read_text())["cuts"]
    tips = [a["data-tip"] or "" for a in page.all("g") if "bar" in (a.get("class") or "")]
    assert len(tips) == len(cuts)
    for cut in cuts:
        said = f"{cut['name']}\nkept {len(cut['kept'])} of {cut['width']} channels"
        assert sum(tip.startswith(said) for tip in tips) == 1


def test_the_page_asks_for_nothing_and_runs_no_other_script(folder: Path) -> None:
    page = page_of(folder)
    loads = [a for tag, a in page.tags if a.get("src") or (tag == "link" and a.get("href"))]
    sources = [a.get("src") or a.get("href") or "" for a in loads]
    assert any(source.startswith("data:image/webp;base64,") for source in sources)
    assert all(source.startswith("data:") for source in sources)
    text = (folder / "report.html").read_text()
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert len(page.all("script")) == 1
    (policy,) = [a["content"] or "" for a in page.all("meta") if a.get("http-equiv")]
    assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-[\w+/=]{44}'", policy)


def test_whatever_a_manifest_says_is_escaped(bundle: Path) -> None:
    change(
        bundle, device=EVIL, precision=EVIL, command=EVIL, recipe=EVIL, versions={EVIL: EVIL},
        host={"cpu": EVIL, EVIL: [EVIL]}, plan={"fusion": EVIL, EVIL: {EVIL: 1}, "lost": EVIL},
        parent={"factory": EVIL, EVIL: EVIL}, latency_ms={"cut": {"median_ms": EVIL}, EVIL: EVIL},
        seconds={EVIL: 1.0}, parity={EVIL: {"of_range": 0.5}},
    )  # fmt: skip
    page = page_of(bundle.parent)
    assert len(page.all("script")) == 1
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all((a.get("src") or "").startswith("data:") for a in page.all("img"))
    assert EVIL in page.text  # shown, as what it is


QUANTISED = {
    "dialect": "onnxruntime-x86", "calibrator": "entropy", "images": 128, "carrier": "fp32",
    "macs_share": {"fp16": 0.0, "fp32": 0.031, "int8": 0.969},
    "kept": [{"node": "/head/Conv_3", "module": "heads.depth.out", "precision": "fp32",
              "why": EVIL}],
    "guard": {"passed": True, "evaluations": 7, "limits": {"depth": 3.0},
              "change_percent": {"depth": -1.25, "room": 0.5}, "too_low_in_fp32": ["room"]},
}  # fmt: skip


def test_what_the_guard_decided_is_a_table_of_nodes_and_tasks(folder: Path) -> None:
    change(folder / "x86-64-cpu/fp32", quantisation=QUANTISED,
           precision_choice={"why": "the fastest that passes"})  # fmt: skip
    text = page_of(folder).text
    for words in (
        "fp32 was chosen: the fastest that passes.",
        "Of the MACs, 3.1 % in fp32, 96.9 % in int8; ranges by entropy of 128 images",
        "The guard is satisfied with one node in high precision, after 7 evaluations. "
        "Below their limits in fp32 already: room.",
        "depth −1.25 % −3.00 %",
        "room +0.50 % none",
        "/head/Conv_3 heads.depth.out fp32 " + EVIL,
    ):
        assert re.sub(r"\s+", "", words) in re.sub(r"\s+", "", text), words
    assert text.count("what the guard decided") == 1  # the other bundle had nothing to decide


@pytest.mark.parametrize(
    "odd", [{"kept": [1], "guard": 5}, {"guard": {"limits": [1], "passed": "x"}}, {"images": None}]
)
def test_decisions_that_are_none_break_no_page(folder: Path, odd: dict[str, Any]) -> None:
    change(folder / "x86-64-cpu/fp32", quantisation=odd)
    assert "what the guard decided" in page_of(folder).text


def test_figures_that_are_none_are_said_to_be_none(bundle: Path) -> None:
    nan = float("nan")
    change(
        bundle, accuracy={"delta_t": nan, "change_percent": {}}, cost={"macs": 0, "params": -1},
        cost_parent={"macs": 0}, plan={"lost": {"depth": nan, "room": "much"}},
        latency_ms={"cut": None, "parent": {"median_ms": None}},
    )  # fmt: skip
    page = page_of(bundle.parent)
    assert "not a number" in page.text and "nan" not in page.text.lower().split()
    assert not any("nan" in (a.get("d") or "").lower() for a in page.all("path"))


def test_bundles_of_one_parent_stand_side_by_side(folder: Path) -> None:
    page = page_of(folder)
    assert page.text.count("Every bundle beside the parent") == 1
    assert "below the limit: depth" in page.text
    titles = {a.get("aria-label") for a in page.all("svg")}
    both = [a for a in page.all("g") if (a.get("data-tip") or "").count("worst task:") == 2]
    assert both  # of one model on two devices neither hides the other
    assert any("latency on x86-64-cpu" in (title or "") for title in titles)


def test_builds_whose_parents_took_unlike_times_are_pointed_out(folder: Path) -> None:
    assert "runs both in turns" not in page_of(folder).text
    again = Path(shutil.copytree(folder / "x86-64-cpu/fp32", folder / "again"))
    latency = json.loads((again / "manifest.json").read_text())["latency_ms"]
    latency["parent"]["median_ms"] *= 2
    change(again, latency_ms=latency)
    assert "runs both in turns" in page_of(folder).text


def test_a_damaged_bundle_is_shown_as_damaged_and_exits_1(folder: Path, capsys) -> None:
    (folder / "raspberry-pi-5/fp32/model.onnx").write_bytes(b"another")
    (folder / "broken").mkdir()
    (folder / "broken/manifest.json").write_text("{")
    code, stdout, _ = run(capsys, "report", folder, "--json")
    result = json.loads(stdout)
    assert code == 1 and len(result["bundles"]) == 2
    assert [problem.split(":")[0] for problem in result["problems"]] == [
        "broken", "raspberry-pi-5/fp32",
    ]  # fmt: skip
    page = Page((folder / "report.html").read_text())
    assert "model.onnx was altered" in page.text and "Not on this page: broken" in page.text


def test_a_picture_outside_of_the_bundle_is_not_embedded(bundle: Path) -> None:
    change(bundle, files={"../pictures/x.png": {"sha256": "0" * 64, "bytes": 1}})
    page = page_of(bundle.parent)
    assert page.all("img") == [] and "outside the bundle" in page.text


def test_a_folder_without_bundles_is_the_users_error(tmp_path: Path, capsys) -> None:
    code, _, stderr = run(capsys, "report", tmp_path)
    assert code == 2 and "no bundle below" in stderr and not (tmp_path / "report.html").exists()


def test_a_bench_is_shown_where_the_build_could_not_measure(folder: Path, capsys) -> None:
    row = {"min_ms": 7.0, "median_ms": 8.125, "percentiles_ms": {"p90": 9.0, "p99": 9.5},
           "max_ms": 10.0, "runs": 9, "coefficient_of_variation": 0.1, "noisy": False}  # fmt: skip
    pi = folder / "raspberry-pi-5/fp32"
    manifest = json.loads((pi / "manifest.json").read_text())
    (pi / "bench.json").write_text(json.dumps({
        "device": "local", "target": "raspberry-pi-5", "precision": "fp32", "runtime": "ort 1.2",
        "threads": 4, "model_sha256": manifest["files"]["model.onnx"]["sha256"], "host": {},
        "latency": {"host_to_host": row},
    }))  # fmt: skip
    page = page_of(folder)
    assert "8.12 ms" in page.text and "bench, ort 1.2, 4 threads" in page.text


LAPTOP = {"meter": "powercap (RAPL)", "covers": ["package-0"], "per_inference_mj": 12.345,
          "standard_error_mj": 0.4321, "within_noise": False, "idle_w": 9.05, "busy_w": 24.1,
          "inferences": 900, "rounds": 5}  # fmt: skip
BOARD = {**LAPTOP, "meter": "INA3221 sensors", "covers": ["VDD_IN"], "per_inference_mj": 45.6}


def benched(bundle: Path, **energy: Any) -> None:
    """Write a bench of the bundle's own model that tells this energy."""
    row = {"min_ms": 7.0, "median_ms": 8.125, "percentiles_ms": {}, "max_ms": 10.0, "runs": 9,
           "coefficient_of_variation": 0.1, "noisy": False}  # fmt: skip
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "bench.json").write_text(json.dumps({
        "device": "local", "target": manifest["device"], "precision": "fp32", "runtime": "ort 1.2",
        "threads": 4, "model_sha256": manifest["files"]["model.onnx"]["sha256"], "host": {},
        "latency": {"host_to_host": row}, **energy,
    }))  # fmt: skip


MORE = {  # of a bench
    "threads_sweep": [
        {"threads": 1, "median_ms": 8.0, "p99_ms": 9.5, "images_per_s": 130.0, "noisy": False},
        {"threads": 2, "median_ms": 4.5, "p99_ms": 6.0, "images_per_s": 240.0, "noisy": True},
    ],
    "offline": {"batch": 8, "images_per_s": 130.5, "latency": {
        "min_ms": 60.0, "median_ms": 61.0, "percentiles_ms": {}, "max_ms": 70.0, "runs": 20,
        "coefficient_of_variation": 0.01, "noisy": True}},
    "memory_mb": {"process_peak": 210.5, "weights": 2.096, "activations": 0.875},
}  # fmt: skip


def test_throughput_threads_and_memory_are_told(folder: Path) -> None:
    benched(folder / "x86-64-cpu/fp32", **MORE)
    text = page_of(folder).text
    assert "Offline: 130.5 images a second, 8 at a time, noisy." in text
    assert (
        "Memory: run.py at its highest 210.5 MB, the model's weights 2.096 MB, "
        "its activations 0.875 MB." in text
    )
    assert re.search(r"By number of threads.*1 ?8\.000 ?9\.500 ?130\.0 ?2 noisy ?4\.500", text)


@pytest.mark.parametrize("noisy", [True, False])
def test_a_bench_on_a_noisy_machine_is_said_to_be(folder: Path, noisy: bool) -> None:
    pi = folder / "raspberry-pi-5/fp32"  # which its build could not measure
    benched(pi)
    record = json.loads((pi / "bench.json").read_text())
    record["latency"]["host_to_host"]["noisy"] = noisy
    (pi / "bench.json").write_text(json.dumps(record))
    text = page_of(folder / "raspberry-pi-5").text
    assert ("host to host (bench, ort 1.2, 4 threads), noisy" in text) == noisy
    assert bool(re.search(r"median, \d threads?, noisy", text)) == noisy
    assert ("the machine was noisy" in text) == noisy


def energy_plots(page: Page) -> list[str]:
    return [title for a in page.all("svg")
            if "against energy" in (title := a.get("aria-label") or "")]  # fmt: skip


def test_energy_is_told_and_drawn_where_it_was_measured(folder: Path) -> None:
    page = page_of(folder)
    assert energy_plots(page) == [] and "secateur bench measures it" in page.text
    benched(folder / "x86-64-cpu/fp32", energy=LAPTOP)
    benched(folder / "raspberry-pi-5/fp32", energy=BOARD)
    page = page_of(folder)
    laptop, board = sorted(energy_plots(page), reverse=True)  # two meters are not one axis
    assert "x86-64-cpu (powercap (RAPL): package-0)" in laptop
    assert "raspberry-pi-5 (INA3221 sensors: VDD_IN)" in board
    said = "12.3 mJ ± 0.43 per inference above idle (standard error of 5 rounds; powercap (RAPL)"
    assert said in page.text and "45.6 mJ" in page.text
    tips = [a["data-tip"] or "" for a in page.all("g") if "dot" in (a.get("class") or "")]
    assert sum("12.3 mJ" in tip for tip in tips) == sum("45.6 mJ" in tip for tip in tips) == 1


def test_energy_that_says_nothing_is_not_drawn(folder: Path) -> None:
    benched(folder / "x86-64-cpu/fp32", energy={**LAPTOP, "within_noise": True})
    reason = "there is no counter of energy in /sys/class/powercap"
    benched(folder / "raspberry-pi-5/fp32", energy={"not_measurable": reason})
    page = page_of(folder)
    assert energy_plots(page) == [] and "within this meter's noise" in page.text
    assert f"not measurable on the machine that was benched: {reason}" in page.text


def test_headings_tables_and_figures_can_be_read_aloud(folder: Path) -> None:
    page = page_of(folder)
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(a.get("scope") for a in page.all("th"))
    assert all(a.get("alt") for a in page.all("img"))
    assert all(a.get("aria-label") or a.get("aria-labelledby") for a in page.all("svg"))
    points = [a for a in page.all("g") if "point" in (a.get("class") or "")]
    assert points and all(a["aria-label"] for a in points)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_each_layer_knows_the_tasks_that_need_it(bundle: Path) -> None:
    tasks = layer_tasks(bundle / "model.onnx")
    assert tasks["stem"] == ("depth", "segmentation")
    assert tasks["seg_mix"] == ("segmentation",) and tasks["depth_mix"] == ("depth",)
    assert next(iter(tasks)) == "stem"


costs = st.floats(0.01, 1e4)
changes = st.floats(-90, 20)


@given(st.lists(st.tuples(costs, changes, changes), min_size=1, max_size=12))
def test_points_lie_on_the_plot_and_the_front_is_not_beaten(
    rows: list[tuple[float, float, float]],
) -> None:
    candidates = [Candidate(x, y, min(y, worst), "1", "") for x, y, worst in rows]
    plot = scatter("", "", candidates)
    assert sum(p.mark.count("1") for p in plot.points) == len(rows)  # none is lost
    for point in plot.points:
        assert 0 <= point.x <= WIDTH and 0 <= point.y <= point.worst <= HEIGHT
    front = pareto_front(candidates)
    for kept in front:
        assert not any((c.x <= kept.x and c.y > kept.y) or (c.x < kept.x and c.y >= kept.y)
                       for c in candidates)  # fmt: skip
    for other in candidates:
        assert any(kept.x <= other.x and kept.y >= other.y for kept in front)


@given(
    st.lists(
        st.tuples(st.integers(1, 2000), st.floats(0, 1)).map(lambda t: (t[0], int(t[0] * t[1]))),
        min_size=1, max_size=40,
    )
)  # fmt: skip
def test_bars_are_as_tall_as_their_layers_are_wide(widths: list[tuple[int, int]]) -> None:
    layers = [Layer(f"net.b{i % 3}.{i}", width, kept, ()) for i, (width, kept) in enumerate(widths)]
    chart = skyline(layers)
    assert sorted(bar.layer.name for bar in chart.bars) == sorted(layer.name for layer in layers)
    tallest = max(layer.width for layer in layers)
    for bar in chart.bars:
        full = bar.kept_height + bar.cut_height
        share = full * tallest / bar.layer.width
        largest = next(b for b in chart.bars if b.layer.width == tallest)
        assert share == pytest.approx(largest.kept_height + largest.cut_height, abs=0.2 * tallest)
        assert bar.cut_y + full == pytest.approx(chart.floor, abs=0.3)
    assert all(a.x < b.x for a, b in zip(chart.bars, chart.bars[1:], strict=False))


def test_numbers_in_words() -> None:
    assert [count(n) for n in (27_842_432, 999, 1_500, 2.5e9)] == [
        "27.8 M",
        "999",
        "1.50 k",
        "2.50 G",
    ]
    assert percent(-1.0983) == "−1.10 %" and percent(0.001) == "0.00 %"
    assert percent(None) == percent(float("inf")) == "not a number"
    assert rounded_percent(-50.007) == "−50 %" and plain(48.08) == "48.08" and plain(True) == "–"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: $SECATEUR_CHROMIUM, Debian's, or the one Playwright brought."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install 'secateur[browser]'"
    )
    with playwright.sync_playwright() as api:
        found = os.environ.get("SECATEUR_CHROMIUM") or shutil.which("chromium")
        if not found and not Path(api.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt install chromium, or playwright install chromium")
        running = api.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_a_browser_shows_the_page(
    browser: Any, folder: Path, width: int, scheme: str, tmp_path: Path
) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
    )
    benched(folder / "x86-64-cpu/fp32", energy=LAPTOP, **MORE)
    change(folder / "x86-64-cpu/fp32", quantisation=QUANTISED)
    report(folder)
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((folder / "report.html").as_uri())
    tip = tab.locator("#tip")
    assert tip.is_hidden()
    tab.locator(".dot:not(.parent) .mark").first.hover()
    assert tip.is_visible() and "worst task" in tip.inner_text()
    tab.keyboard.press("Escape")
    assert tip.is_hidden()
    bars = tab.locator(".skyline").first.locator(".bar")
    bars.first.focus()
    first = tip.inner_text()
    tab.keyboard.press("ArrowRight")
    assert tip.inner_text() != first and "channels" in tip.inner_text()
    tab.keyboard.press("End")
    assert bars.last.evaluate("bar => bar === document.activeElement")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")  # no sideways scroll
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    tab.locator("details").evaluate_all("all => all.forEach(each => { each.open = true; })")
    loaded = "images => images.every(i => { i.loading = 'eager'; return true; })"
    assert tab.locator("img").evaluate_all(loaded)
    tab.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    found = axe.Axe().run(tab).response["violations"]
    assert [v["id"] for v in found] == []
    assert said == [] and all(url.startswith(("file:", "data:")) for url in asked)
    tab.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 10_000
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    context.close()
