"""How to speak of what the labels are: clusters, classes, outliers, a density or a value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from neuralize._columns import significant

if TYPE_CHECKING:
    from neuralize.explanation import Explanation
    from neuralize.sentences import Portrait

__all__ = ["Words", "count", "notes", "words"]

_NOTES = {"votes": "no class wins against all others; decided by votes"}


def count(n: int, what: str) -> str:
    """ "1 row", "12,000 rows"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def notes(e: Explanation, i: int) -> tuple[str, ...]:
    """What is to know about a row beside its numbers."""
    return tuple(_NOTES.get(name, name) for name, rows in e.notes.items() if rows[i])


def _rows(p: Portrait) -> str:
    return "This row is" if p.single else f"{count(p.rows, 'row')} {'is' if p.rows == 1 else 'are'}"


class Words:
    """Of clusters; the other kinds differ where they must."""

    several, columns = "Clusters", "Clusters and columns"
    noun = "cluster"

    def name(self, label: Any) -> str:
        """A label within a sentence."""
        return f"{self.noun} {label}"

    def head(self, label: Any) -> str:
        """A label as a heading."""
        text = self.name(label)
        return text[:1].upper() + text[1:]

    def order(self, p: Portrait) -> str:
        """What the rows are closer to, and than what."""
        near, far = (p.label, p.contrast) if p.claim == "closer" else (p.contrast, p.label)
        return f"closer to {self.name(near)} than to {self.name(far)}"

    def heading(self, p: Portrait) -> str:
        """A few words about a portrait."""
        if p.claim == "in":
            return self.head(p.label) + ("" if p.contrast is None else f" rather than {self.name(p.contrast)}")
        text = f"not in {self.name(p.label)}" if p.claim == "out" else self.order(p)
        return text[:1].upper() + text[1:]

    def opening(self, p: Portrait) -> tuple[str, str, str]:
        """Subject, what leads on from it, and the word before the reasons."""
        joint = "because" if p.single else "because of"
        if p.claim == "in" and not p.single:
            rival = "" if p.contrast is None else f" from {self.name(p.contrast)}"
            return f"{self.head(p.label)} ({count(p.rows, 'row')})", f" is set apart{rival}", "by"
        if p.claim == "in":
            rival = "" if p.contrast is None else f" rather than in {self.name(p.contrast)}"
            return f"{_rows(p)} in {self.name(p.label)}{rival}", "", joint
        what = f"not in {self.name(p.label)}" if p.claim == "out" else self.order(p)
        return f"{_rows(p)} {what}", "" if p.single else ",", joint

    def silent(self, p: Portrait) -> str:
        """Where no column speaks for the claim."""
        most = p.features[-1]
        if not most.relevance:
            return "no column plays a part"
        who = "its columns" if p.single else "on average the columns"
        verb, _, rest = self.opposite(p).partition(" ")
        stand = f" {most.stand}" if most.stand else ""
        return f"{who} {verb.removesuffix('s')} {rest}, {most.name}{stand} most, but not enough"

    def opposite(self, p: Portrait) -> str:
        """What the column does that speaks most against the claim."""
        return "speaks against it" if p.claim in ("in", "closer") else f"speaks for {self.name(p.label)}"

    def does(self, p: Portrait) -> str:
        """The head of the column of sides."""
        return {"out": "Speaks against it", "farther": "Speaks for the contrast"}.get(p.claim, "Speaks for it")

    # ------------------------------------------------------------------ one row

    def why(self, target: Any, contrast: Any, inside: bool, output: float) -> str:
        """The question that one row's numbers answer."""
        if contrast is not None and inside:
            return f"why {self.name(target)} rather than {self.name(contrast)}"
        if contrast is not None:
            return f"why closer to {self.name(target if output > 0 else contrast)}"
        return f"why {'' if inside else 'not '}{self.name(target)}"

    does_it = "Speaks for it"

    def scope(self, own: bool) -> str:
        """What is explained of a table with several targets."""
        return f"its own {self.noun}" if own else f"the {self.noun} asked for"

    def asked(self, target: Any) -> tuple[str, str]:
        """Heads of the two lists of one row."""
        return f"Speaks for {self.name(target)}", f"Speaks against {self.name(target)}"

    # ------------------------------------------------------------------ a table

    def question(self, e: Explanation) -> str:
        """What was explained."""
        own = bool((e.target == e.decided).all())
        one = len(np.unique(e.target)) == 1
        which = self.name(e.target[0]) if one else f"the {self.noun} asked for"
        if e.contrast is None:
            return f"why {which if one else f'each row is in its {self.noun}'}" if own else f"why, or why not, {which}"
        single = len(np.unique(e.contrast)) == 1
        rival = self.name(e.contrast[0]) if single else "the contrast"
        return f"why {which if one or not own else f'its own {self.noun}'} rather than {rival}"

    def title(self, own: bool) -> str:
        """Of a page."""
        return f"What sets the {self.several.lower()} apart"

    def sides(self, own: bool) -> tuple[str, str]:
        """What positive and negative relevance say."""
        return f"speaks for the {self.noun}{'' if own else ' asked for'}", "against it"

    def output(self, e: Explanation, own: bool) -> str:
        """What the output is, in sentences."""
        mine, alone = f"its {self.noun}" if own else f"the {self.noun} asked for", e.contrast is None
        if "distance" not in e.unit:
            rival = "all others" if alone else "the contrast"
            return f"by how much the model favours {mine} over {rival}, in {e.unit}. At 0 they are level."
        rival, border = "the contrast", "between the two"
        below = "" if own else "Below 0 it is closer to the contrast; "
        if alone:
            rival, border = "the nearest other", f"between {self.several.lower()}"
            below = "" if own else f"Below 0 the row is in another {self.noun}; "
        return f"by how much a row is closer to {mine} than to {rival}. {below}0 is the border {border}."

    ends = "nearest to the border", "farthest from it"


class _Classes(Words):
    several, columns = "Classes", "Classes and columns"
    noun = "class"

    def order(self, p: Portrait) -> str:
        near, far = (p.label, p.contrast) if p.claim == "closer" else (p.contrast, p.label)
        return f"more like {self.name(near)} than {self.name(far)}"

    def why(self, target: Any, contrast: Any, inside: bool, output: float) -> str:
        if contrast is not None and not inside:
            return f"why more like {self.name(target if output > 0 else contrast)}"
        return super().why(target, contrast, inside, output)


class _Outliers(Words):
    several, columns = "Outliers and inliers", "Columns of outliers and inliers"
    noun = "side"

    def name(self, label: Any) -> str:
        return "an outlier" if label == -1 else "an inlier"

    def head(self, label: Any) -> str:
        return "Outliers" if label == -1 else "Inliers"

    def heading(self, p: Portrait) -> str:
        return self.head(p.label) if p.claim == "in" else f"Not {self.head(p.label).lower()}"

    def opening(self, p: Portrait) -> tuple[str, str, str]:
        if p.single:
            return f"This row is {'' if p.claim == 'in' else 'not '}{self.name(p.label)}", "", "because"
        if p.claim == "in":
            return f"{self.head(p.label)} ({count(p.rows, 'row')})", " are set apart", "by"
        what = self.name(p.label) if p.rows == 1 else self.head(p.label).lower()
        return f"{_rows(p)} not {what}", ",", "because of"

    def opposite(self, p: Portrait) -> str:
        return "speaks against it" if p.claim == "in" else f"speaks for {self.name(p.label)}"

    def why(self, target: Any, contrast: Any, inside: bool, output: float) -> str:
        return f"why {'' if inside else 'not '}{self.name(target)}"

    def question(self, e: Explanation) -> str:
        own = bool((e.target == e.decided).all())
        if len(np.unique(e.target)) > 1:
            return "why each row is an outlier or an inlier" if own else "why, or why not, the side asked for"
        return f"why {'' if own else 'or why not '}{self.name(e.target[0])}"

    def scope(self, own: bool) -> str:
        return "what the row is" if own else "the side asked for"

    def title(self, own: bool) -> str:
        return "What sets the outliers apart"

    def sides(self, own: bool) -> tuple[str, str]:
        return ("speaks for what the row is" if own else "speaks for the side asked for"), "against it"

    def output(self, e: Explanation, own: bool) -> str:
        mine = "what the row is (outlier or inlier)" if own else "the side asked for"
        return f"by how much the model favours {mine}, in {e.unit}. 0 is the border between outliers and inliers."


class _Density(Words):
    several, columns = "Densities", "Columns and density"
    noun = "density"
    ends = "of lowest density", "of highest density"

    def name(self, label: Any) -> str:
        return "the log density"

    def heading(self, p: Portrait) -> str:
        return "Rows of lowest density" if p.claim == "rarest" else "The other rows" if p.beside else "Log density"

    def opening(self, p: Portrait) -> tuple[str, str, str]:
        if p.single:
            return f"This row has a log density of {significant(p.output)}", f", {p.claim}", "because"
        if p.claim == "rarest":
            have = "has" if p.rows == 1 else "have"
            return f"{count(p.rows, 'row')} {have} the lowest log density ({p.limit} or less)", ",", "because of"
        who = ("the other " if p.beside else "") + count(p.rows, "row")
        return f"The log density of {who} (median {significant(p.output)})", f" is {p.claim}", "by"

    def opposite(self, p: Portrait) -> str:
        return "lowers it" if p.claim == "raised" else "raises it"

    def does(self, p: Portrait) -> str:
        return "Raises it" if p.claim == "raised" else "Lowers it"

    def why(self, target: Any, contrast: Any, inside: bool, output: float) -> str:
        return f"log density {significant(output)}"

    does_it = "Raises it"

    def scope(self, own: bool) -> str:
        return "the log density"

    def asked(self, target: Any) -> tuple[str, str]:
        return "Raises the log density", "Lowers the log density"

    def question(self, e: Explanation) -> str:
        return "what raises and lowers the log density"

    def title(self, own: bool) -> str:
        return "What makes rows usual or rare"

    def sides(self, own: bool) -> tuple[str, str]:
        return "raises the log density", "lowers it"

    def output(self, e: Explanation, own: bool) -> str:
        return "the logarithm of the density that the model gives to the row; the lower, the rarer."


class _Value(Words):
    several, columns = "Predictions", "Columns and prediction"
    noun = "value"
    ends = "nearest to the reference value", "farthest from it"

    def name(self, label: Any) -> str:
        return "the predicted value"

    def _where(self, claim: str) -> str:
        return {"above": "above", "below": "below"}.get(claim, "at") + " the reference value"

    def heading(self, p: Portrait) -> str:
        text = self._where(p.claim)
        return text[:1].upper() + text[1:]

    def opening(self, p: Portrait) -> tuple[str, str, str]:
        start = f"{_rows(p)} predicted {self._where(p.claim)}"
        return start, "" if p.single else ",", "because" if p.single else "because of"

    def opposite(self, p: Portrait) -> str:
        return "raises it" if p.claim == "below" else "lowers it"

    def does(self, p: Portrait) -> str:
        return "Lowers it" if p.claim == "below" else "Raises it"

    def why(self, target: Any, contrast: Any, inside: bool, output: float) -> str:
        return f"why {self._where('above' if output > 0 else 'below' if output < 0 else 'at')}"

    does_it = "Raises it"

    def scope(self, own: bool) -> str:
        return "the prediction"

    def asked(self, target: Any) -> tuple[str, str]:
        return "Raises the prediction", "Lowers the prediction"

    def question(self, e: Explanation) -> str:
        return f"why above or below the reference value {e.level:.6g}"

    def title(self, own: bool) -> str:
        return "What raises and lowers the prediction"

    def sides(self, own: bool) -> tuple[str, str]:
        return "raises the prediction", "lowers it"

    def output(self, e: Explanation, own: bool) -> str:
        return f"positive where the prediction is above the reference value {e.level:.6g}, negative below; in {e.unit}."


_KINDS: dict[str, type[Words]] = {
    "cluster": Words,
    "class": _Classes,
    "outlier": _Outliers,
    "density": _Density,
    "value": _Value,
}


def words(kind: str) -> Words:
    """The words of one kind of labels; those of clusters for a kind that is not known."""
    return _KINDS.get(kind, Words)()
