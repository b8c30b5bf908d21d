"""FOCI as a scikit-learn feature selector."""

import numbers
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lcodec_ext._arrays import (
    as_array,
    class_codes,
    column_names,
    in_memory,
    listed,
    refuse_columns,
    refuse_converted,
)
from lcodec_ext._checks import check_choice
from lcodec_ext.dependence.backends.base import Ties
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve_on_cpu
from lcodec_ext.dependence.foci import foci
from lcodec_ext.dependence.scaling import Standardize
from lcodec_ext.dependence.table import as_response

try:
    from sklearn.base import BaseEstimator
    from sklearn.feature_selection import SelectorMixin
    from sklearn.utils import Tags, check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "FOCISelector needs scikit-learn: pip install 'lcodec-ext[sklearn]'"
    ) from error


_MOST_CLASSES = 20  # integers with more values are taken for counts


def _looks_nominal(given: Any, y: Any) -> bool:
    """Whether y, given as integers, looks like class labels: three or more, few, and repeated."""
    try:
        integers = as_response(given).dtype.kind in "iu"
    except ValueError:  # objects, which scikit-learn has converted
        entries = np.asarray(given, dtype=object).ravel()
        integers = all(isinstance(entry, numbers.Integral) for entry in entries)
    if not integers:
        return False
    return 3 <= len(np.unique(y)) <= min(_MOST_CLASSES, len(y) // 2)


class FOCISelector(SelectorMixin, BaseEstimator):
    """Select features with FOCI: the columns on which y depends, without a model.

    See `lcodec_ext.foci` for the method, its cost and conditioning columns, and
    ``docs/dependence.md``. y holds numbers or class labels. Data are on the CPU.

    Parameters
    ----------
    max_features, min_gain, stop, alpha, n_permutations, standardize, ties, backend, decimals
        As in `lcodec_ext.foci`, with its defaults; backend "cuda" is refused.
    random_state : int, RandomState instance or None
        For ``ties="random"`` and ``stop="permutation"``.
    classes : {"auto", "yes", "no"}, default "auto"
        Whether y holds classes without an order, so that their numbers and names change nothing.
        "auto": strings and unordered categories do, and so do integers of 3 to 20 different
        values, as in scikit-learn's classification data. Pass "no" where such integers are
        counts or grades, whose order `lcodec_ext.foci` uses.

    Attributes
    ----------
    ordering_ : ndarray of int64, shape (n_selected,)
        Selected columns, best first. ``transform`` and ``get_support(indices=True)`` keep the
        columns in the order of the input, as scikit-learn's selectors do.
    cumulative_ : ndarray of float64, shape (n_selected,)
        T(y, selected so far) after each step.
    conditional_ : ndarray of float64, shape (n_selected,)
        T(y, column | those before) of each step.
    threshold_, pvalues_ : ndarray of float64, or None
        With ``stop="permutation"``, of every step and last of the one that ended the selection: the
        T that chance reaches, and the p-value. None with another stop.
    support_ : ndarray of bool, shape (n_features_in_,)
        Which columns were selected; none, if none has T > 0, or none passes the test of
        ``stop="permutation"``.
    n_features_in_ : int
    feature_names_in_ : ndarray of str, shape (n_features_in_,)
        Only if X has column names that are all strings.

    Notes
    -----
    Where nothing is selected, ``transform`` warns and returns a table without columns, which the
    next step of a pipeline refuses. There is nothing to predict y by, then. A pipeline that must go
    on takes the best column at any rate: ``FOCISelector(stop=False, max_features=1)``.

    Examples
    --------
    >>> import numpy as np
    >>> from lcodec_ext import FOCISelector
    >>> X = np.random.default_rng(0).normal(size=(500, 10))
    >>> y = X[:, 2] * X[:, 5]
    >>> FOCISelector().fit(X, y).get_support(indices=True)
    array([2, 5])
    """

    def __init__(
        self,
        *,
        max_features: int | None = None,
        min_gain: float = 0.0,
        stop: bool | Literal["permutation"] = True,
        standardize: Standardize | None = "scale",
        ties: Ties = "average",
        random_state: int | np.random.RandomState | None = None,
        backend: BackendLike = "auto",
        classes: Literal["auto", "yes", "no"] = "auto",
        decimals: int | None = None,
        alpha: float | None = None,
        n_permutations: int | None = None,
    ) -> None:
        self.max_features = max_features
        self.min_gain = min_gain
        self.stop = stop
        self.standardize = standardize
        self.ties = ties
        self.random_state = random_state
        self.backend = backend
        self.classes = classes
        self.decimals = decimals
        self.alpha = alpha
        self.n_permutations = n_permutations

    def fit(self, X: ArrayLike, y: ArrayLike) -> "FOCISelector":
        """Select features of X, of shape (n_samples, n_features), for at least 3 samples."""
        backend = resolve_on_cpu("FOCISelector", self.backend, X=X, y=y)
        check_choice(self.classes, "classes", ("auto", "yes", "no"))
        for name, value in (("X", X), ("y", y)):
            if in_memory(value, name) is not value:
                raise ValueError(
                    f"{name} is a {type(value).__name__}, which scikit-learn cannot read: pass "
                    f"numpy.from_dlpack({name})"
                )
        refuse_columns(X, "X")  # scikit-learn takes dates for numbers
        self._names, table = column_names(X), X
        if isinstance(y, list | tuple):
            y = listed(y, "y")
        found = class_codes(y)
        if found is None:
            refuse_columns(y, "y")
        if self.classes == "no" and found is not None and found[1]:
            raise ValueError("y holds strings or categories, and classes='no' expects numbers")
        given = [X, y if found is None else found[0]]
        for k, name in enumerate("Xy"):
            if np.ma.is_masked(given[k]):  # scikit-learn would take what is below the mask
                given[k] = as_array(given[k], name)[0]
        X, y = self._validated(*given)
        refuse_converted(given[0], X, "X")
        refuse_converted(given[1], y, "y")
        likely = _looks_nominal(given[1], y) if found is None else found[1]
        if self.classes == "yes" or (self.classes == "auto" and likely):
            y = np.unique(y, return_inverse=True)[1].astype(str)
        seed = None
        if self.ties == "random" or self.stop == "permutation":
            seed = int(check_random_state(self.random_state).randint(2**31))
        no_policy: Any = None  # messages then do not advise one
        result = foci(
            X if self._names is None else table,  # of a table messages have the names
            y,
            nan_policy=no_policy,
            stop=self.stop,
            max_features=self.max_features,
            min_gain=self.min_gain,
            standardize=self.standardize,
            ties=self.ties,
            seed=seed,
            backend=backend,
            decimals=self.decimals,
            alpha=self.alpha,
            n_permutations=self.n_permutations,
        )
        self.ordering_ = result.ordering
        self.cumulative_ = result.cumulative
        self.conditional_ = result.conditional
        self.threshold_, self.pvalues_ = result.threshold, result.pvalues
        self.support_ = np.zeros(self.n_features_in_, dtype=bool)
        self.support_[self.ordering_] = True
        return self

    def _validated(self, X: Any, y: Any) -> tuple[NDArray, NDArray]:
        """X and y as scikit-learn takes them; text in X is told by its column."""
        try:
            with np.errstate(all="ignore"):  # its sums may overflow
                checked: tuple[NDArray, NDArray] = validate_data(
                    self,
                    X,
                    y,
                    dtype=(np.float64, np.float32),
                    y_numeric=True,
                    ensure_all_finite=False,  # foci names the column
                    ensure_min_samples=3,
                )
        except ValueError as error:
            if "could not convert" in str(error):
                as_array(X, "X", tensors=False)
            raise
        return checked

    def _get_support_mask(self) -> NDArray[np.bool_]:
        check_is_fitted(self)
        return self.support_

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> NDArray:
        """Names of the selected columns, in the order of the input.

        Parameters
        ----------
        input_features : array_like of str, optional
            Names of all columns; by default those of the table that was fitted, also where
            scikit-learn does not know its library, and x0, x1, ... without any.
        """
        if input_features is None and not hasattr(self, "feature_names_in_"):
            check_is_fitted(self)
            input_features = None if self._names is None else np.array(self._names, dtype=object)
        return super().get_feature_names_out(input_features)

    def __sklearn_tags__(self) -> Tags:
        tags: Any = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags
