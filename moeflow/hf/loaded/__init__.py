"""What a loaded model has in place of modules of transformers', or beside them: experts modules whose parameters stay
on disk, layers of multi-token prediction.

Knows transformers' modules. Knows nothing of runtimes, budgets or requests. `loading/` and `engine/` import it.
"""
