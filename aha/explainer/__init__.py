"""The explainer network: frozen encoder, class-conditioned DPT decoder (paper §3.5)."""

from .explainer import Explainer

__all__ = ["Explainer"]
