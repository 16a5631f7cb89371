"""Clusters of texts, explained word by word on sparse rows.

k-means on TF-IDF rows. The corpus is what every installation has: docstrings of
the packages that this project requires, read from their sources without
importing them; the part of the library a text comes from is its true topic. It
is no benchmark corpus: texts are short and technical, and their topics are
easier than those of newsgroups. Names of the packages are left out of the
vocabulary.

Held-out texts are explained from their word counts, through TF-IDF. The words
of a text are deleted in the order of their relevance, TF-IDF computed anew, and
the logit of its cluster is tracked; nothing is fitted again. Relevance also says
what the absence of a word means. That is tested by exchanging columns, words the
text has or has not, for those of another text.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from experiments.experiment import Experiment, Report
from lrp.errors import DataError

if TYPE_CHECKING:
    from experiments.study import Study

__all__ = [
    "CONTROLS",
    "EXCHANGED",
    "EXPERIMENT",
    "LISTS",
    "METHODS",
    "REMOVALS",
    "RULES",
    "STEPS",
    "Corpus",
    "areas",
    "averaged",
    "corpus",
    "docstrings",
    "exchanged",
    "logits",
    "quality",
    "rankings",
    "without",
]

Floats = NDArray[np.float64]

TOPICS = (
    "scipy.signal", "scipy.stats", "scipy.optimize", "scipy.sparse", "scipy.ndimage", "sklearn.metrics",
    "numpy.polynomial", "numpy.ma", "matplotlib", "pandas", "torch.nn", "torch.distributed",
)  # fmt: skip
#: words that only name the package
NAMES = ("numpy", "scipy", "sklearn", "scikit", "matplotlib", "pandas", "torch", "pytorch", "np", "pd", "plt")
RULES = ("LRP", "LRP, nearest competitor")
CONTROLS = (
    "gradient x input",
    "occlusion",
    "gradient x (input - mean)",
    "occlusion by the mean",
    "sensitivity",
    "TF-IDF weight",
    "centroid weight",
    "centroid weight x TF-IDF weight",
    "random",
)
METHODS = (*RULES, *CONTROLS)
#: what becomes of a text without some of its words
REMOVALS = {"deleted": "deleted from the text, TF-IDF anew", "zeroed": "TF-IDF value set to 0, the others kept"}
EXCHANGED = "exchanged"
#: numbers of columns that are exchanged
STEPS = (5, 10, 20, 40, 80, 160, 320)
#: lists of a cluster's words
LISTS = ("LRP, words present", "LRP", "gradient x input", "centroid weight")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Word counts (N, D) in CSR, the topic of each text, and the words."""

    counts: Any
    topics: NDArray[np.int64]
    names: tuple[str, ...]
    words: tuple[str, ...]
    digest: str


def docstrings(topic: str, least: int = 40) -> list[str]:
    """Docstrings of a package or a part of it, of so many words at least, without repetitions; sorted.

    Raises
    ------
    DataError
        If the package is not installed.
    """
    package, *parts = topic.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "a package whose docstrings are read is missing", expected=package, got="nothing", fix=f"install {package}"
        )
    folder = Path(spec.submodule_search_locations[0]).joinpath(*parts)
    found: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        if "tests" in path.parts:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in sources that are not ours
            tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node)
                if text and len(text.split()) >= least:
                    found.add(text)
    return sorted(found)


def corpus(topics: Sequence[str], most: int) -> Corpus:
    """Counts of the words of the docstrings, at most so many texts per topic, drawn with a fixed seed."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    texts: list[str] = []
    labels: list[int] = []
    for k, topic in enumerate(topics):
        found = docstrings(topic)
        chosen = np.sort(np.random.default_rng(0).permutation(len(found))[:most])
        texts += [found[i] for i in chosen]
        labels += [k] * len(chosen)
    stop = sorted({*ENGLISH_STOP_WORDS, *NAMES})
    vectorizer = CountVectorizer(token_pattern=r"(?u)\b[a-z]{3,}\b", stop_words=stop, min_df=5, max_df=0.3)
    counts = scipy.sparse.csr_array(vectorizer.fit_transform(texts)).astype(np.float64)
    y = np.array(labels)
    kept = np.diff(counts.indptr) >= 15
    digest = hashlib.sha256("\0".join(t for t, k in zip(texts, kept, strict=True) if k).encode()).hexdigest()[:16]
    words = tuple(str(w) for w in vectorizer.get_feature_names_out())
    return Corpus(counts[kept], y[kept], tuple(topics), words, digest)


def logits(distances: Floats, own: NDArray[np.int64]) -> Floats:
    """f of each row's own cluster from its distances (N, K) to the centres: how much farther the next is, squared."""
    squared = distances**2
    at = np.arange(len(squared))
    mine = squared[at, own]
    squared[at, own] = np.inf
    return np.asarray(squared.min(1) - mine)


def averaged(Z: Floats, centres: Floats, own: NDArray[np.int64], mean: Floats) -> Floats:
    """How much f falls when one column of a row (N, D) takes the mean: the occlusion that sees absent words, too."""
    found = np.empty_like(Z)
    for i, (z, c) in enumerate(zip(Z, own, strict=True)):
        apart = (z - centres) ** 2
        changed = apart.sum(1)[:, None] + (mean - centres) ** 2 - apart
        others = np.arange(len(centres)) != c
        start = apart.sum(1)
        found[i] = (start[others].min() - start[c]) - (changed[others].min(0) - changed[c])
    return found


def rankings(
    pipeline: Any, net: Any, counts: Any, own: NDArray[np.int64], mean: Floats, seed: int
) -> tuple[dict[str, Floats], dict[str, float]]:
    """All methods on texts (N, D) of counts, towards each text's own cluster, words that a text has not included.

    ``mean`` (D,) is the mean TF-IDF row of training texts.

    Also returned: conservation, time, and the share of relevance on words that are not in the text.
    """
    from neuralize import CoverageWarning, neuralize
    from neuralize.evaluation import gradient, random_values

    measured: dict[str, float] = {}
    present = counts.toarray() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        net.explain(counts[:2])  # what is made once does not count
        began = time.perf_counter()
        short = net.explain(counts)
        measured["sparse_ms"] = 1000 * (time.perf_counter() - began) / len(own)
        began = time.perf_counter()
        full = net.explain(counts, top=None)
        measured["dense_ms"] = 1000 * (time.perf_counter() - began) / len(own)
        hard = net.explain(counts, rule="midpoint", top=None)
    gaps = [np.abs(np.asarray(e.values.sum(1)).ravel() + e.residual - e.output) for e in (short, full, hard)]
    measured["conservation"] = float(np.max(gaps) / np.abs(full.output).max())
    measured["kept"] = float(np.diff(short.values.indptr).mean())
    size = np.abs(full.values)
    measured["absent_share"] = float(((size * ~present).sum(1) / size.sum(1)).mean())
    Z = np.asarray(pipeline[0].transform(counts).toarray())
    kmeans = pipeline[-1]
    slope = gradient(neuralize(kmeans), Z, target=own)
    centres = kmeans.cluster_centers_[own]
    alone = np.zeros_like(Z)
    start = logits(pipeline.transform(counts), own)
    for i, x in enumerate(counts.toarray()):
        words = np.flatnonzero(x)
        fewer = np.broadcast_to(x, (len(words), len(x))).copy()
        fewer[np.arange(len(words)), words] = 0
        rows = scipy.sparse.csr_array(fewer)
        alone[i, words] = start[i] - logits(pipeline.transform(rows), np.full(len(words), own[i]))
    values = {
        "LRP": np.asarray(full.values),
        "LRP, nearest competitor": np.asarray(hard.values),
        "gradient x input": slope * Z,
        "occlusion": alone,
        "gradient x (input - mean)": slope * (Z - mean),
        "occlusion by the mean": averaged(Z, kmeans.cluster_centers_, own, mean),
        "sensitivity": slope**2,
        "TF-IDF weight": Z,
        "centroid weight": centres,
        "centroid weight x TF-IDF weight": centres * Z,
        "random": random_values(Z, seed),
    }
    return values, measured


def exchanged(pipeline: Any, train: Any, counts: Any, values: Floats, own: NDArray[np.int64], seed: int) -> Any:
    """Curve of the logit while TF-IDF columns take the values of a random training text, most relevant first."""
    from neuralize import neuralize
    from neuralize.evaluation import flip

    Z, R = (pipeline[0].transform(rows).toarray() for rows in (counts, train))
    steps = [k for k in STEPS if k <= Z.shape[1]]
    net = neuralize(pipeline[-1])
    return flip(net, Z, values, imputer="marginal", draws=5, seed=seed, target=own, reference=R, steps=steps)


def without(counts: Floats, values: Floats, share: float, most: bool) -> Floats:
    """Texts (N, D) without a share of their words, those of most or least relevance; at least one where it is not 0."""
    out = counts.copy()
    for i, (x, v) in enumerate(zip(counts, values, strict=True)):
        words = np.flatnonzero(x)
        k = int(np.ceil(share * len(words)))
        order = words[np.argsort(-v[words] if most else v[words], kind="stable")]
        out[i, order[:k]] = 0
    return out


def areas(
    pipeline: Any, counts: Floats, values: Floats, own: NDArray[np.int64], shares: Sequence[float]
) -> dict[str, Any]:
    """Curves of the mean logit over its start, for both removals and both orders, and their areas by the trapezoid
    rule in units of the constant start."""
    out: dict[str, Any] = {}
    tfidf = pipeline[0].transform(scipy.sparse.csr_array(counts)).toarray()
    start = float(logits(pipeline.transform(scipy.sparse.csr_array(counts)), own).mean())
    for removal in REMOVALS:
        for order in ("most", "least"):
            curve, stays = [1.0], [1.0]
            for share in shares:
                fewer = without(counts, values, share, order == "most")
                if removal == "deleted":
                    distances = pipeline.transform(scipy.sparse.csr_array(fewer))
                else:
                    distances = pipeline[-1].transform(scipy.sparse.csr_array(np.where(fewer > 0, tfidf, 0)))
                f = logits(distances, own)
                curve.append(float(f.mean()) / start)
                stays.append(float((f > 0).mean()))
            at = np.array([0.0, *shares])
            area = float(((np.array(curve[1:]) + np.array(curve[:-1])) / 2 * np.diff(at)).sum() / at[-1])
            out[f"{removal} {order}"] = {"area": area, "curve": curve, "stays": stays}
    return out


def quality(words: Sequence[int], has: NDArray[np.bool_], member: NDArray[np.bool_]) -> float:
    """Mean over words of F1 of "a text that has the word is in the cluster".

    Examples
    --------
    >>> has = np.array([[True, True], [True, False], [False, True], [False, False]])
    >>> quality([0], has, np.array([True, True, False, False])), quality([1], has, np.array([True, True, False, False]))
    (1.0, 0.5)
    """
    found = []
    for t in words:
        both = float((has[:, t] & member).sum())
        found.append(2 * both / max(float(has[:, t].sum() + member.sum()), 1.0))
    return float(np.mean(found))


def _lists(
    values: Mapping[str, Floats], kmeans: Any, own: NDArray[np.int64], texts: Corpus, train: Any, labels: Any
) -> dict[str, Any]:
    """Words of every cluster by four lists, judged on the training texts, which gave no relevance."""
    has = train.toarray() > 0
    values = {**values, LISTS[0]: np.where(texts.counts.toarray() > 0, values["LRP"], 0.0)}
    out: dict[str, Any] = {"clusters": [], "f1": {}}
    scores: dict[str, list[float]] = {name: [] for name in LISTS}
    for c in range(len(kmeans.cluster_centers_)):
        mine = own == c
        if not mine.any():
            continue
        told: dict[str, Any] = {"cluster": c, "texts": int((labels == c).sum())}
        topics = np.bincount(texts.topics[mine.nonzero()[0]], minlength=len(texts.names))
        told["topic"], told["purity"] = texts.names[int(topics.argmax())], float(topics.max() / mine.sum())
        for name in LISTS:
            weight = kmeans.cluster_centers_[c] if name == "centroid weight" else values[name][mine].mean(0)
            best = np.argsort(-weight, kind="stable")[:10]
            told[name] = [[texts.words[t], round(float(weight[t]), 5)] for t in best]
            scores[name].append(quality(best.tolist(), has, labels == c))
        out["clusters"].append(told)
    out["f1"] = {name: float(np.mean(v)) for name, v in scores.items()}
    for other in LISTS[1:]:
        both = [len({w for w, _ in t[LISTS[0]]} & {w for w, _ in t[other]}) for t in out["clusters"]]
        out.setdefault("shared", {})[other] = float(np.mean(both))
    return out


def one(study: Study, texts: Corpus, seed: int) -> dict[str, Any]:
    """A cell: one split of the texts and one clustering."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.metrics import adjusted_rand_score
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline

    from neuralize import neuralize

    s = study.settings
    train, test = train_test_split(
        np.arange(len(texts.topics)), test_size=s["held_out"], stratify=texts.topics, random_state=seed
    )
    kmeans = KMeans(s["clusters"], n_init=s["starts"], random_state=seed)
    pipeline = make_pipeline(TfidfTransformer(sublinear_tf=True), kmeans).fit(texts.counts[train])
    net = neuralize(pipeline)
    counts = texts.counts[test]
    own = np.asarray(pipeline.predict(counts), dtype=np.int64)
    mean = np.asarray(pipeline[0].transform(texts.counts[train]).mean(0)).ravel()
    values, measured = rankings(pipeline, net, counts, own, mean, seed)
    part = Corpus(counts, texts.topics[test], texts.names, texts.words, texts.digest)
    dense = counts.toarray()
    judged = slice(0, s["judged"])
    flipping: dict[str, Any] = {}
    for method, v in values.items():
        flipping[method] = areas(pipeline, dense[judged], v[judged], own[judged], s["shares"])
        curve = exchanged(pipeline, texts.counts[train], counts[judged], v[judged], own[judged], seed)
        relative = (curve.mean / curve.mean[0]).tolist()
        flipping[method][EXCHANGED] = {"area": float(curve.area("mean", "index").value), "curve": relative}
    return {
        "seed": seed,
        "texts": len(texts.topics),
        "words": len(texts.words),
        "words_per_text": float(np.diff(texts.counts.indptr).mean()),
        "per_topic": {n: int((texts.topics == k).sum()) for k, n in enumerate(texts.names)},
        "digest": texts.digest,
        "explained": len(test),
        "adjusted_rand": float(adjusted_rand_score(texts.topics[test], own)),
        "rows_compared": len(texts.topics),
        "rows_differing": int((net.predict(texts.counts) != pipeline.predict(texts.counts)).sum()),
        **measured,
        "flipping": flipping,
        **_lists(values, kmeans, own, part, texts.counts[train], kmeans.labels_),
    }


def work(study: Study) -> None:
    """One split and clustering per seed."""
    keys = [f"split|{seed}" for seed in study.seeds]
    if study.has(keys):
        return
    texts = corpus(study.settings["topics"], study.settings["most"])
    for seed in study.progress(study.seeds, "splits"):
        study.cell(f"split|{seed}", partial(one, study, texts, seed))


def report(study: Study) -> Report:
    """Tables, figures and verdicts from the rows."""
    from experiments.papers.text_clusters_report import report as written

    return written(study)


_SHARES = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]
EXPERIMENT = Experiment(
    name="text_clusters",
    paper="Kauffmann et al. 2024, arXiv 1906.07633",
    question="Which words make a text belong to its cluster?",
    full={
        "seeds": 4, "topics": list(TOPICS), "most": 150, "clusters": 12, "starts": 5, "held_out": 0.25, "judged": 100,
        "shares": _SHARES,
    },
    quick={
        "seeds": 3, "topics": list(TOPICS[:6]), "most": 50, "clusters": 6, "starts": 1, "held_out": 0.3, "judged": 40,
        "shares": _SHARES,
    },
    work=work,
    report=report,
)  # fmt: skip
