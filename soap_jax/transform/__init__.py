"""Feedback for any JAX function, by its linear program."""

from soap_jax.transform.explanation import Explanation, explain
from soap_jax.transform.wrap import with_feedback

__all__ = ["Explanation", "explain", "with_feedback"]
