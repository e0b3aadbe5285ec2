"""The five kinds of trust, one file each: rows, prompts, readers of answers, metrics per item.

``HEADLINE`` names each vertical's main metric and whether more of it is worse (+1) or better (-1).
"""

HEADLINE = {
    "toxicity": ("expected_max_toxicity", +1),
    "stereotype": ("agreement_rate", +1),
    "ethics": ("false_negative_rate", +1),
    "truthfulness": ("accuracy", -1),
    "privacy": ("leak_rate", +1),
}
