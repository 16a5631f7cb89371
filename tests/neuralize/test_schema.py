"""The raw table as numbers: codes, missing values, names, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from oracles.pipelines import customers, dense, iris, tensor, wine
from sklearn.compose import ColumnTransformer, make_column_selector, make_column_transformer
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, PowerTransformer, StandardScaler

from lrp import errors
from neuralize import steps
from neuralize.fronts import Front
from neuralize.schema import Schema


def teaches(info: pytest.ExceptionInfo[errors.LRPError], *words: str) -> None:
    error = info.value
    assert error.expected
    assert error.got
    assert error.fix
    for word in words:
        assert word in str(error), str(error)


def usual(**encoder: Any) -> ColumnTransformer:
    """What most tables of customers go through."""
    return make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["age", "income"]),
        (OneHotEncoder(**encoder), ["colour", "city", "member"]),
        (OrdinalEncoder(categories=[["S", "M", "L"]]), ["size"]),
        remainder="drop",
    )


@pytest.fixture(scope="module")
def fitted() -> ColumnTransformer:
    return usual().fit(customers())


@pytest.fixture(scope="module")
def both(fitted: ColumnTransformer) -> tuple[Front, Schema]:
    return steps.front([("prep", fitted)])


def test_kinds(both: tuple[Front, Schema]) -> None:
    made, schema = both
    assert schema.names == ("colour", "age", "doors", "member", "income", "city", "size")
    assert schema.n_features == made.inputs == 7
    assert schema.categories == {
        "colour": ("blue", "green", "red", "violet"),
        "member": ("False", "True"),
        "city": ("Bern", "Oslo", "Rome"),
        "size": ("S", "M", "L"),
    }
    assert dict(zip(schema.names, schema.coded, strict=True)) == {
        "colour": True,
        "age": False,
        "doors": False,
        "member": False,
        "income": False,
        "city": True,
        "size": True,
    }
    # doors are dropped
    assert [n for n, used in zip(schema.names, schema.used, strict=True) if not used] == ["doors"]
    # imputed, a category of its own, not read
    nullable = {n for n, ok in zip(schema.names, schema.nullable, strict=True) if ok}
    assert nullable == {"colour", "age", "doors", "income"}


def test_codes(both: tuple[Front, Schema]) -> None:
    _, schema = both
    X = customers()
    x = schema.encode(X)
    assert x.dtype == np.float64
    for name, known in schema.categories.items():
        t = schema.names.index(name)
        shown = [None if np.isnan(v) else known[int(v)] for v in x[:, t]]
        assert shown == [None if pd.isna(v) else str(v) for v in X[name]]
    np.testing.assert_array_equal(x[:, 1], X["age"].to_numpy())
    np.testing.assert_array_equal(x[:, 4], X["income"].to_numpy())


def test_the_same_table_in_other_clothes(fitted: ColumnTransformer, both: tuple[Front, Schema]) -> None:
    _, schema = both
    X = customers()
    x = schema.encode(X)
    clothes: dict[str, Any] = {
        "objects": X.astype(object),
        "array of objects": X.astype(object).to_numpy(),
        "categories": X.astype({"colour": "category", "size": "category"}),
        "nullable": X.astype({"age": "Float64", "member": "boolean", "doors": "Int64", "colour": "string"}),
        "float32": X.astype({"member": np.float32}),
        "rows as lists": X.astype(object).where(X.notna(), np.nan).to_numpy().tolist(),
    }
    for name, table in clothes.items():
        np.testing.assert_array_equal(schema.encode(table), x, err_msg=name)
    assert schema.read(X).index is X.index
    assert schema.read(X).names == schema.names
    np.testing.assert_array_equal(schema.encode(X.iloc[3:4]), x[3:4])


def test_no_rows(both: tuple[Front, Schema]) -> None:
    made, schema = both
    assert schema.encode(customers()[:0]).shape == (0, 7)
    assert made(tensor(schema.encode(customers()[:0]))).shape == (0, made.outputs)
    assert schema.encode(np.empty((0, 7), dtype=object)).shape == (0, 7)
    with pytest.raises(errors.InputError, match="no rows"):
        schema.read(customers()[:0])
    plain = Schema.plain(4)
    assert plain.encode(np.empty((0, 4))).shape == (0, 4)
    with pytest.raises(errors.InputError, match="no rows"):
        plain.read(np.empty((0, 4)))


BAD: dict[str, tuple[Callable[[pd.DataFrame], Any], type[errors.LRPError], tuple[str, ...]]] = {
    "missing column": (lambda f: f.drop(columns="city"), errors.ColumnError, ("missing: 'city'",)),
    "surplus column": (lambda f: f.assign(more=1), errors.ColumnError, ("not seen in fit: 'more'",)),
    "other order": (lambda f: f[f.columns[::-1]], errors.ColumnError, ("order", "'colour'")),
    "column twice": (lambda f: f[[*f.columns, "city"]], errors.ColumnError, ("twice", "'city'")),
    "narrow array": (lambda f: f.to_numpy()[:, 1:], errors.ColumnError, ("7", "6")),
    "one row": (lambda f: f.to_numpy()[0], errors.InputError, ("1 dimension", "reshape")),
    "ragged": (lambda f: [["a"] * 7, ["b"]], errors.InputError, ("",)),
    "words for numbers": (lambda f: f.assign(income="much"), errors.InputError, ("columns without numbers", "income")),
    "dates for numbers": (
        lambda f: f.assign(age=pd.Timestamp("2020-01-01")),
        errors.InputError,
        ("columns without numbers", "age"),
    ),
    "lists for words": (
        lambda f: f.assign(city=pd.Series([[1]] * len(f), dtype=object)),
        errors.InputError,
        ("'city'", "no category"),
    ),
    "unknown word": (
        lambda f: f.assign(city=f["city"].astype(str).where(f.index != 5, "Paris")),
        errors.InputError,
        ("'city'", "'Paris' in row 5", "OneHotEncoder", "'Bern', 'Oslo', 'Rome'", "handle_unknown='ignore'"),
    ),
    "unknown number": (
        lambda f: f.assign(member=f["member"].astype(int) * 2),
        errors.InputError,
        ("'member'", "2", "OneHotEncoder"),
    ),
    "missing word": (
        lambda f: f.assign(size=f["size"].where(f.index > 2)),
        errors.InputError,
        ("'size'", "nan in row 0, 3 such rows", "OrdinalEncoder", "impute"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables(both: tuple[Front, Schema], name: str) -> None:
    make, kind, words = BAD[name]
    with pytest.raises(kind) as info:
        both[1].encode(make(customers()))
    teaches(info, *words)


def test_unused_columns_may_hold_anything(both: tuple[Front, Schema]) -> None:
    made, schema = both
    X = customers()
    for odd in ("many", np.inf, None):
        x = schema.encode(X.assign(doors=odd))
        assert np.isnan(x[:, 2]).all()
        torch.testing.assert_close(made(tensor(x)), made(tensor(schema.encode(X))), rtol=0, atol=0)


def test_unknown_categories_that_are_ignored() -> None:
    X = customers()
    fitted = usual(handle_unknown="ignore").fit(X)
    made, schema = steps.front([("prep", fitted)])
    new = X.assign(city=X["city"].astype(str).where(X.index != 5, "Paris"), member=X["member"].astype(int) * 2)
    x = schema.encode(new)
    assert x[5, schema.names.index("city")] == -1
    np.testing.assert_allclose(made(tensor(x)).numpy(), dense(fitted.transform(new)), atol=1e-12)


def test_one_column_for_several_encoders() -> None:
    """Codes are positions in one list per column, whatever each encoder knows."""
    X = customers()
    fitted = ColumnTransformer(
        [
            ("few", OneHotEncoder(categories=[["red", "blue"]], handle_unknown="ignore"), ["colour"]),
            ("rank", OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=9), ["colour", "size"]),
            (
                "frequent",
                make_pipeline(SimpleImputer(strategy="constant", fill_value="grey"), OneHotEncoder()),
                ["colour"],
            ),
        ]
    ).fit(X)
    made, schema = steps.front([("prep", fitted)])
    # what only the imputer names comes last
    assert schema.categories["colour"] == ("red", "blue", "green", "violet", "grey")
    x = schema.encode(X)
    z = made(tensor(x)).numpy()
    np.testing.assert_array_equal(np.isnan(z), np.isnan(dense(fitted.transform(X))))
    np.testing.assert_allclose(z, dense(fitted.transform(X)), atol=1e-12)
    # the last encoder refuses what the others ignore
    with pytest.raises(errors.InputError, match="'pink' in row 0"):
        schema.encode(X.assign(colour="pink"))


def test_categories_stand_in_the_order_of_the_encoder() -> None:
    X = customers()[["colour", "size"]]
    filled = SimpleImputer(strategy="constant", fill_value="none")
    fitted = make_pipeline(filled, OneHotEncoder()).fit(X)
    made, schema = steps.front(fitted.steps)
    assert schema.categories["colour"] == tuple(fitted[1].categories_[0]) == ("blue", "green", "none", "red", "violet")
    np.testing.assert_array_equal(made(tensor(schema.encode(X))).numpy(), dense(fitted.transform(X)))


def test_none_is_a_category_beside_nan() -> None:
    values = np.array([["a"], [None], ["b"], [np.nan], ["a"]], dtype=object)
    fitted = OneHotEncoder().fit(values)
    made, schema = steps.front([("hot", fitted)])
    assert schema.categories == {"x0": ("a", "b", "None")}
    np.testing.assert_array_equal(made(tensor(schema.encode(values))).numpy(), dense(fitted.transform(values)))
    only_nan = OneHotEncoder().fit(values[[0, 2, 3]])
    with pytest.raises(ValueError, match="unknown categories"):
        only_nan.transform(values)
    with pytest.raises(errors.InputError, match="None in row 1"):
        steps.front([("hot", only_nan)])[1].encode(values)


def test_numbers_as_objects() -> None:
    values = np.array([["a", 1, 2.5], ["b", 3, 0.5], ["a", 1, 1.5]], dtype=object)
    fitted = ColumnTransformer([("hot", OneHotEncoder(), [0, 1]), ("rest", "passthrough", [2])]).fit(values)
    made, schema = steps.front([("prep", fitted)])
    assert schema.categories == {"x0": ("a", "b")}
    np.testing.assert_array_equal(
        made(tensor(schema.encode(values))).numpy(), fitted.transform(values).astype(np.float64)
    )
    with pytest.raises(errors.InputError, match=r"'x1'.*2\.0|'x1'.*2 in row 0"):
        schema.encode(np.array([["a", 2, 1.0]], dtype=object))


def test_words_read_as_numbers_are_refused() -> None:
    X = pd.DataFrame({"grade": np.array(["1", "2", "3", "2"], dtype=object)})
    fitted = ColumnTransformer([("hot", OneHotEncoder(), ["grade"]), ("scale", StandardScaler(), ["grade"])]).fit(X)
    with pytest.raises(errors.UnsupportedEstimatorError) as info:
        steps.front([("prep", fitted)])
    teaches(info, "'grade'", "categories and as numbers")
    dates = pd.DataFrame({"day": pd.to_datetime(["2020-01-01", "2020-01-02"])})
    with pytest.raises(errors.UnsupportedEstimatorError, match="dates"):
        steps.front([("hot", OneHotEncoder().fit(dates))])


def test_names() -> None:
    frame = wine()
    scaled = make_pipeline(StandardScaler(), PCA(2)).fit(frame)
    _, schema = steps.front(scaled.steps)
    assert schema.numeric
    assert schema.names == tuple(frame.columns)
    assert schema.categories == {}
    assert schema.nullable == (False,) * 13
    with pytest.raises(errors.ColumnError, match="'alcohol'"):
        schema.encode(frame[frame.columns[::-1]])
    _, schema = steps.front(make_pipeline(StandardScaler()).fit(iris()).steps)
    assert schema.names is None
    assert schema.feature_names == ("x0", "x1", "x2", "x3")
    _, schema = steps.front([("id", FunctionTransformer().fit(iris()))], ["a", "b", "c", "d"], 4)
    assert schema.feature_names == ("a", "b", "c", "d")
    inner = Pipeline([("none", "passthrough"), ("scale", StandardScaler())])
    union = FeatureUnion([("same", "passthrough"), ("pipe", inner)]).fit(frame)
    made, schema = steps.front([("union", union)])
    assert schema.names == tuple(frame.columns)
    assert made.outputs == 26
    named = Pipeline([("pca", PCA(3).set_output(transform="pandas")), ("scale", StandardScaler())]).fit(iris())
    assert hasattr(named[1], "feature_names_in_")
    assert steps.front([("all", named)])[1].names is None
    made, schema = steps.front([], n_features=2)
    assert (made.inputs, made.outputs) == (2, 2)
    with pytest.raises(errors.ColumnError, match="number of columns"):
        steps.front([("id", "passthrough")])


def test_tables_of_numbers_are_referred_to() -> None:
    _, schema = steps.front([("scale", StandardScaler().fit(iris()))])
    X = iris().astype(np.float32)
    assert schema.read(X).array is X
    sparse = scipy.sparse.csr_array(X)
    np.testing.assert_array_equal(schema.encode(sparse), X)
    with pytest.raises(errors.InputError, match="object"):
        schema.read(X.astype(object))


def test_sparse_tables_and_masks_beside_encoders() -> None:
    X = np.array([[0.0, 2.0], [1.0, 0.0], [1.0, 5.0]])
    fitted = ColumnTransformer([("hot", OneHotEncoder(), [0]), ("rest", "passthrough", [1])]).fit(X)
    _, schema = steps.front([("prep", fitted)])
    for table in (scipy.sparse.csr_array(X), scipy.sparse.coo_array(X), np.ma.masked_equal(X, 9), torch.tensor(X)):
        np.testing.assert_array_equal(schema.encode(table), X)
    with pytest.raises(errors.NonFiniteError, match="masked"):
        schema.encode(np.ma.masked_equal(X, 5))


def test_missing_values_are_allowed_where_something_takes_them() -> None:
    X = iris().copy()
    X[::5, 1] = np.nan
    for steps_, allowed in (
        ((SimpleImputer(),), True),
        ((StandardScaler(), SimpleImputer(), PCA(2)), True),
        ((PowerTransformer(), SimpleImputer(add_indicator=True)), True),
        ((StandardScaler(),), False),
        ((SimpleImputer(missing_values=0),), False),
    ):
        fitted = make_pipeline(*steps_).fit(X if allowed else iris())
        made, schema = steps.front(fitted.steps)
        assert schema.nullable == (allowed,) * 4
        z = made(tensor(schema.encode(X)))
        assert bool(z.isfinite().all()) is allowed
        if allowed:
            np.testing.assert_allclose(z.numpy(), fitted.transform(X), atol=1e-12)


# ---------------------------------------------------------------------- real tables


@pytest.mark.data
def test_penguins(tabular: Callable[..., pd.DataFrame]) -> None:
    frame = tabular("penguins.csv").drop(columns="species")
    assert frame.isna().any(axis=None)
    fitted = make_pipeline(
        make_column_transformer(
            (make_pipeline(SimpleImputer(), StandardScaler()), make_column_selector(dtype_include="number")),
            (OneHotEncoder(drop="if_binary", sparse_output=False), ["island", "sex"]),
        ),
        PCA(3),
    ).fit(frame)
    made, schema = steps.front(fitted.steps)
    z = made(tensor(schema.encode(frame)))
    np.testing.assert_allclose(z.numpy(), fitted.transform(frame), atol=1e-12)
    R = made.frame.values(z, z)
    np.testing.assert_allclose(R.sum(1).numpy(), (z * z).sum(1).numpy(), rtol=1e-10)
    assert set(schema.categories) == {"island", "sex"}
    # a bill can be imputed, an island is known
    nullable = dict(zip(schema.names or (), schema.nullable, strict=True))
    assert nullable == {
        "island": False,
        "bill_length_mm": True,
        "bill_depth_mm": True,
        "flipper_length_mm": True,
        "body_mass_g": True,
        "sex": True,
    }


@pytest.mark.data
def test_german(tabular: Callable[..., pd.DataFrame]) -> None:
    frame = tabular("german.csv", header=None).drop(columns=20)
    frame.columns = [f"A{t + 1}" for t in range(20)]
    fitted = ColumnTransformer(
        [
            (
                "number",
                make_pipeline(PowerTransformer(), StandardScaler()),
                make_column_selector(dtype_include="number"),
            ),
            (
                "word",
                OneHotEncoder(min_frequency=0.05, handle_unknown="infrequent_if_exist"),
                make_column_selector(dtype_exclude="number"),
            ),
        ]
    ).fit(frame.iloc[:500])
    made, schema = steps.front([("prep", fitted)])
    assert len(schema.categories) == 13
    new = frame.iloc[500:].copy()
    new.loc[600, "A4"] = "A99"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        Z = dense(fitted.transform(new))
    z = made(tensor(schema.encode(new)))
    np.testing.assert_allclose(z.numpy(), Z, atol=1e-12)
    assert len(made.frame.blocks) == 1
    assert not made.frame.mixes
    R = tensor(np.random.default_rng(0).normal(size=(6, made.outputs)))
    np.testing.assert_allclose(made.frame.spread(R).sum(1).numpy(), R.sum(1).numpy(), rtol=1e-12)
