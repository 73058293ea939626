"""How well each statistic tells memorized prompts from others: measured on labelled prompts, with its cost."""
