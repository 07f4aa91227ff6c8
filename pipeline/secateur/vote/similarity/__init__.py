"""How alike two tasks are, one measure a file, found by its name (``measure.measure_of``).

A measure has ``sketch``, which makes of plain arrays the small array that is stored with an entry,
``similarity`` of two sketches (larger is more alike), and ``EXPLAINED``, what its number says.
"""

NOT_ENTRIES = frozenset({"measure"})
