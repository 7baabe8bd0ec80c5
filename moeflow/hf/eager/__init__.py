"""Weights as transformers itself loads them, one parameter or expert at a time, and experts as it runs them.

Others are compared with them, or written of them; of packed and quantised experts, the values that they stand for.
Knows transformers' conversions and its modules' own forward. Knows nothing of runtimes. `verify/` and `convert/`
import it.
"""
