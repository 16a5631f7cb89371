"""Model definitions of torchvision and timm, on a CPU build of torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import pytest
import torch

_LIBRARY: list[torch.library.Library] = []


def _declare_schemas() -> None:
    """torchvision's import refers to two compiled operators that no model here uses."""
    if _LIBRARY:
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.append(library)


@pytest.fixture(scope="session")
def torchvision_models() -> Any:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision's model definitions: make peers")
    _declare_schemas()
    from torchvision import models

    return models


@pytest.fixture(scope="session")
def timm(torchvision_models: Any) -> Any:
    return pytest.importorskip("timm", reason="needs timm's model definitions: make peers")


@pytest.fixture(scope="session")
def zennit(torchvision_models: Any) -> Any:
    if importlib.util.find_spec("zennit") is None:
        pytest.skip("needs zennit 1.0.0: make peers")
    version = importlib.metadata.version("zennit")
    assert version == "1.0.0", f"zennit {version} is no oracle (0.5.1 has a batch-norm bug): make peers"
    import zennit
    import zennit.attribution
    import zennit.composites
    import zennit.torchvision

    return zennit
