"""Pair losses that read more than log-probs of the answers: whole distributions, or answers that the policy writes.

As those of twdpo/losses.py, which holds the table. Legend: S sequences (2i chosen, 2i+1 rejected), P pairs, N response
tokens.
"""

VOCABULARY_LOSSES = {}
