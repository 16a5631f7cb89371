"""Model definitions of torchvision and timm, on a CPU build of torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import pytest


@pytest.fixture(scope="session")
def torchvision_models() -> Any:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision's model definitions: make peers")
    from experiments.models import torchvision_models as definitions

    return definitions()


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
