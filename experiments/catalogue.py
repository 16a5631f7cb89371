"""All experiments by name, each in a module that is read only when it is asked for."""

from __future__ import annotations

import importlib

from experiments.experiment import Experiment
from lrp.errors import InputError

__all__ = ["MODULES", "experiment"]

#: name to the module that holds it as ``EXPERIMENT``, in the order of the papers
MODULES = {
    "toy_pruning": "papers.toy_pruning",
    "few_shot_pruning": "papers.few_shot_pruning",
    "vgg_pruning": "papers.vgg_pruning",
    "iterative_pruning": "papers.iterative_pruning",
    "composite_search": "papers.composite_search",
    "ecqx": "papers.ecqx",
    "small_quantization": "papers.small_quantization",
    "cluster_flipping": "papers.cluster_flipping",
    "translation": "papers.translation",
    "svm_flipping": "papers.svm_flipping",
    "outliers": "papers.outliers",
    "text_clusters": "papers.text_clusters",
    "clever_hans": "papers.clever_hans",
    "tabular_artefact": "papers.tabular_artefact",
}


def experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises
    ------
    InputError
        If there is none.
    """
    if name not in MODULES:
        raise InputError(
            f"there is no experiment '{name}'",
            expected=", ".join(MODULES),
            got=repr(name),
            fix="choose one; python -m experiments list shows what they ask",
        )
    found: Experiment = importlib.import_module(f"experiments.{MODULES[name]}").EXPERIMENT
    return found
