"""Which cut networks TensorRT parses and builds: python benchmarks/tensorrt/run.py

Backbones with three heads, random weights, cut to half their MACs (see random_cuts.py). Each is
written in fp32, fp16 and TensorRT's int8 by the pipeline's own writers, and built by the bundle's
own build_engine.py with tensorrt-rtx, which needs no GPU: a check that the file is parsed, typed
and built, not of what runs how fast. $SECATEUR_TENSORRT_PYTHON names the Python that has
tensorrt-rtx, by default this one. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engines import FORMS, built, plans, tensorrt_version, write_form
from random_cuts import SEED, Case, random_cut
from secateur.core.errors import SecateurError
from secateur.core.model import evaluating
from secateur.core.progress import shown, track
from secateur.devices.host import library_versions
from secateur.lower import compare_outputs, export_onnx
from secateur.lower.export import FORM
from secateur.lower.quant import macs_share
from secateur.prune import count_macs
from secateur.runtimes.base import runtime_of
from suite import RESULTS, Show, append_row, exit_status, read_rows, write_suite

CELLS = RESULTS / "tensorrt.cells.jsonl"
IMAGES, COMPARED = 8, 4  # calibrated on; compared
CASES = tuple(map(Case, (
    "resnet18", "resnet50", "mobilenetv2_100", "mobilenetv3_large_100",
    "mobilenetv4_conv_small", "efficientnet_lite0", "efficientnet_b0", "regnetx_008",
    "regnety_008", "repvgg_a2", "mobileone_s1", "repvit_m1", "hgnet_small", "hgnetv2_b0",
    "hrnet_w18_small", "ghostnet_100", "densenet121", "inception_v3", "vgg16_bn",
    "convnext_tiny", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
)))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first two backbones only")
    options = parser.parse_args()
    cases = CASES[:2] if options.quick else CASES
    versions = {name: library_versions().get(name) for name in ("torch", "timm")}
    versions |= {"tensorrt-rtx": tensorrt_version(), "exported form": str(FORM)}
    done = {row["backbone"]: row for row in read_rows(CELLS) if row["versions"] == versions}
    missing = [case for case in cases if case.backbone not in done]
    with shown():
        for case in track(missing, "building engines", len(missing)):
            done[case.backbone] = {**row_of(case), "versions": versions}
            append_row(CELLS, done[case.backbone])
    rows = [done[case.backbone] for case in cases]
    if options.quick:
        print(json.dumps(rows, indent=2))
        return
    shows = claims(rows)
    write_suite("tensorrt", "python benchmarks/tensorrt/run.py", [SEED], rows, shows)
    exit_status(shows)


def row_of(case: Case) -> dict[str, Any]:
    """Cut a network, write it in every precision and build each; say why what fails does."""
    row: dict[str, Any] = {"backbone": case.backbone, "size": case.size}
    try:
        parent, images = case.network(), case.images(IMAGES)
        cut = random_cut(parent, case, images[:1])
        row["share_of_macs"] = round(
            count_macs(cut, images[:1]) / count_macs(parent, images[:1]), 4
        )
        with evaluating(cut):
            wanted = {name: tensor.numpy() for name, tensor in cut(images[:COMPARED]).items()}
        with tempfile.TemporaryDirectory() as scratch:
            fp32 = Path(scratch) / "fp32" / "model.onnx"
            fp32.parent.mkdir()
            export_onnx(cut, images[:1], fp32)
            for form, plan in plans(fp32, images).items():
                path = write_form(fp32, form, plan)
                session = runtime_of("onnxruntime").open_session(path, 1)
                got = compare_outputs(wanted, dict(session.run(images[:COMPARED].numpy())))
                of_range = max(found.relative for found in got.values())
                shares = macs_share(fp32, plan) if plan else {}
                row[form] = {
                    "of_range": float(f"{of_range:.2g}"),
                    "share_of_macs": {name: round(share, 3) for name, share in shares.items()},
                    **built(path),
                }
    except SecateurError as error:
        row.update({form: {"fails": error.message} for form in FORMS if form not in row})
    return row


def claims(rows: list[dict[str, Any]]) -> list[Show]:
    def works(form: str) -> int:
        return sum("bytes" in row[form] for row in rows)

    count = len(rows)
    shows = [Show(f"cut backbones of {count} that TensorRT-RTX builds in {form}", count,
                  works(form), ">=") for form in FORMS]  # fmt: skip
    loose = sum(row[form].get("layers_without_task", 0) for row in rows for form in FORMS)
    return [*shows, Show("layers of all these that no task is known for", 0, loose, "<=")]


if __name__ == "__main__":
    main()
