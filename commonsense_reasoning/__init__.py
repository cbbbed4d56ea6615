"""Commonsense reasoning: LLaMA-3 8B on commonsense_170k, eight benchmarks (paper, section 4.1 and Tables 1, 3, 4)."""
