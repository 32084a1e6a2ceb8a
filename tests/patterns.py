"""Small models of the patterns that decide a channel graph's worth."""

import image_patterns  # noqa: F401 - registers its models
import sequence_patterns  # noqa: F401
from pattern_registry import PATTERNS

__all__ = ["PATTERNS"]
