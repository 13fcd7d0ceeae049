"""Rewiring: masks that change while the network trains, inside the compiled step.

A rule is three parts that know nothing of each other: which connections go and which come (``scores.py``), and how many
there are to be (``budgets.py``). ``rules.py`` and ``pruning.py`` put them together, ``_event.py`` carries them out.
"""
