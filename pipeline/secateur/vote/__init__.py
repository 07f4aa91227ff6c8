"""Earlier cuts of a parent, kept so that the next one starts from what similar tasks kept.

``library`` keeps entries (``entry``) in one folder (``store``), ``archive`` carries them to another
machine, ``nearest`` finds those of similar tasks by a measure of ``similarity``.
"""
