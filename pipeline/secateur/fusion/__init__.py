"""Many tasks' scores into one (``scores``), and many tasks' copies of weights (``weights``)."""
