"""Many tasks' scores into one. (Many tasks' weights into one comes with soft sharing.)"""
