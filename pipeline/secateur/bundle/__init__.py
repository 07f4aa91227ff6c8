"""The bundle: a folder with a model, its manifest and a runner that needs nothing of ours."""

from secateur.bundle.manifest import Manifest
from secateur.bundle.read import read_bundle
from secateur.bundle.write import write_bundle

__all__ = ["Manifest", "read_bundle", "write_bundle"]
