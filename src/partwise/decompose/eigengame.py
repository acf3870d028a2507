"""Principal components as the equilibrium of a game: every component is a player who keeps clear of those in front."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from partwise.checks import check_choice
from partwise.decompose._eigen_rounds import ParallelDeflation
from partwise.decompose.parallel_deflation import SETTLED, RoundEstimator
from partwise.engine import Engine

if TYPE_CHECKING:
    from partwise.decompose._covariance import Covariance

__all__ = ["OPTIMIZERS", "VARIANTS", "EigenGame"]

VARIANTS = ("mu", "alpha")
OPTIMIZERS = ("sgd", "adam")


class EigenGame(RoundEstimator):
    """Principal components by EigenGame, on the same rounds as parallel deflation.

    Player k climbs towards variance and is pushed away from the players in front. ``mu`` ("unloaded") takes out of the product ``S v`` its parts along
    them; its gradient is unbiased on a batch. ``alpha`` ascends the utility of the first paper, which divides by a player's variance and is biased on
    a batch. With exact players in front both agree with parallel deflation. It ships to compare with, and as a second solver.

    Parameters
    ----------
    n_components : int, default=2
        Players, at most the smaller of n_samples and n_features.
    variant : {"mu", "alpha"}, default="mu"
        What the players in front take away.
    optimizer : {"sgd", "adam"}, default="sgd"
        Plain steps along the gradient, or Adam's.
    num_rounds : int, default=500
        Rounds at most. Player k joins in round k.
    num_local_steps : int, default=5
        Steps of a player between two exchanges.
    batch_size : int, optional
        Rows per step, drawn anew for each; by default all. With batches all ``num_rounds`` are run, since no batch can tell when to stop.
    step_size : float, optional
        First step: of ``sgd`` in units of one over the running largest eigenvalue, by default infinite (the gradient replaces the vector) or 1 on
        batches; of ``adam`` per entry, by default 0.01, or 0.03 on batches. On batches steps shrink with the rounds.
    engine : {"inline", "ray"} or Engine, default="inline"
        Where the players run.
    num_workers : int, optional
        Worker processes of ``engine="ray"``.
    mode : {"sync", "async"}, default="sync"
        Whether players wait for each other between rounds.
    max_staleness : int, optional
        With ``mode="async"``: publications by which a player may be ahead of one in front of it.
    tol : float, default=1e-6
        Stop when every residual ``||S v - value v||`` is within half of it, times the largest eigenvalue; 0 runs all rounds.
    rayleigh_ritz : bool, default=False
        Finish with the best vectors within the span that was found.
    random_state : int, RandomState or None, default=None
        Decides the start and the batches.

    Attributes
    ----------
    components_ : ndarray of shape (n_components_, n_features)
        Unit rows, largest eigenvalue first; the largest entry in size is positive.
    explained_variance_, explained_variance_ratio_, singular_values_ : ndarray of shape (n_components_,)
        As in scikit-learn's ``PCA``.
    mean_ : ndarray of shape (n_features,)
        Mean of each feature.
    residuals_ : ndarray of shape (n_components_,)
        ``||S v - value v||`` of each component.
    eigenvalue_intervals_ : ndarray of shape (n_components_, 2)
        The covariance matrix has an eigenvalue in each, counted as often as it occurs.
    missed_value_test_ : MissedValueTest
        What a search for larger eigenvalues outside the components found.
    n_components_, n_samples_, n_features_in_, n_iter_ : int
        Sizes of the fit, and rounds that were run.
    converged_ : bool
        Whether they ended because of ``tol``.
    history_ : list of dict
        For each round its number, seconds since the start, values, residuals and floats sent.
    traffic_ : Traffic or None
        Bytes that the engine moved.
    schedule_ : Schedule or None
        Order of events of an asynchronous fit, which ``replay`` repeats.

    See Also
    --------
    ParallelDeflationPCA : The same rounds; deflation leaves more solvers to choose from.

    Notes
    -----
    Differences from the papers: players join one after the other; gradients of ``adam`` are tangent to the sphere and divided by the running largest
    eigenvalue; the reference code's generalised eigenvalue problem is left out.

    References
    ----------
    Gemp, McWilliams, Vernade, Graepel. EigenGame Unloaded: When Playing Games Is Better than Optimizing. arXiv:2102.04152.

    Gemp, McWilliams, Vernade, Graepel. EigenGame: PCA as a Nash Equilibrium. arXiv:2010.00554.

    Examples
    --------
    >>> X = np.random.default_rng(0).normal(size=(500, 4)) * [4.0, 3.0, 2.0, 1.0]
    >>> game = EigenGame(n_components=2, variant="alpha", random_state=0).fit(X)
    >>> game.converged_, game.components_.shape
    (True, (2, 4))
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        variant: str = "mu",
        optimizer: str = "sgd",
        num_rounds: int = 500,
        num_local_steps: int = 5,
        batch_size: int | None = None,
        step_size: float | None = None,
        engine: str | Engine = "inline",
        num_workers: int | None = None,
        mode: str = "sync",
        max_staleness: int | None = None,
        tol: float = 1e-6,
        rayleigh_ritz: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.variant = variant
        self.optimizer = optimizer
        self.num_rounds = num_rounds
        self.num_local_steps = num_local_steps
        self.batch_size = batch_size
        self.step_size = step_size
        self.engine = engine
        self.num_workers = num_workers
        self.mode = mode
        self.max_staleness = max_staleness
        self.tol = tol
        self.rayleigh_ritz = rayleigh_ritz
        self.random_state = random_state

    def round_method(self, covariance: Covariance, seed: int) -> ParallelDeflation:
        """The rounds that these settings stand for, on this covariance."""
        check_choice(self.variant, VARIANTS, name="variant")
        check_choice(self.optimizer, OPTIMIZERS, name="optimizer")
        whole_steps = self.step_size is None and self.batch_size is None
        solver = "adam" if self.optimizer == "adam" else "power" if whole_steps else "hebb"
        return ParallelDeflation(
            covariance=covariance,
            solver=solver,
            update=self.variant,
            num_local_steps=self.num_local_steps,
            batch_size=self.batch_size,
            step_size=self.step_size,
            tol=SETTLED * self.tol,
            seed=seed,
        )

    def _advice(self) -> str:
        return "Raise num_rounds or num_local_steps, pass rayleigh_ritz=True if values are close to each other, or leave batch_size out."
