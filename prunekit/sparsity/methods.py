"""Options of SparseLLM."""

from dataclasses import dataclass, replace

from prunekit.checks import Count, Positive, check_fields


@dataclass(frozen=True)
class SparseLLM:
    """The SparseLLM method and its options.

    Attributes:
        n_iterations: T; with 1 it is SparseGPT.
        faithful: as in the released code, which fits weights with an undamped pseudo-inverse (two-matrix FFNs: W_down
            with ten gradient steps), moves s by two steps of a fixed length, adds up damping, and keeps the last
            iteration. It diverges if X is nearly rank-deficient or z is large. False, the default, fits weights by
            a proximal step, moves s by steps that cannot overshoot, damps each iteration alike,
            and keeps the iteration whose FFN output has the least error.
        alpha: weight of ‖z − WX‖²; None is .1 for two-matrix FFNs and 5 for gated ones, as in the released code.
        beta: weight of ‖W_down·p − Y‖²; None as above.
        gamma: weight of ‖p − φ(z)‖²; None as above.

    Source: SparseLLM (Bai et al., NeurIPS 2024), Eq. 4 to 12. Differs as said under `faithful`; there, pseudo-inverses
        are Gram matrices and Cholesky factors, and gradients closed forms.
    """

    n_iterations: Count = 4
    faithful: bool = False
    alpha: Positive | None = None
    beta: Positive | None = None
    gamma: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def for_form(self, gated: bool) -> "SparseLLM":
        """The options with default weights filled in."""
        default = 5.0 if gated else 0.1
        alpha, beta, gamma = (default if w is None else w for w in (self.alpha, self.beta, self.gamma))
        return replace(self, alpha=alpha, beta=beta, gamma=gamma)
