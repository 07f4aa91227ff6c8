"""How far a build is, told on stderr; travels inside build_engine.py.

Standard library only, Python 3.8.
"""

import sys
import time

TOLD_EVERY = 5.0  # seconds between lines on how far a build is


def progress_monitor(trt):
    """Return what a build tells its steps to; ``stopped`` once the user wants no more of it."""

    class Progress(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.steps, self.stopped = {}, False
            self.began = self.last = time.monotonic()

        def phase_start(self, phase_name, parent_phase, num_steps):
            if parent_phase is None or parent_phase in self.steps:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name, step):
            try:
                now = time.monotonic()
                if now - self.last > TOLD_EVERY:
                    self.last, most = now, self.steps.get(phase_name)
                    line = "{:.0f} s: {}, step {} of {}\n"
                    sys.stderr.write(line.format(now - self.began, phase_name, step + 1, most))
                    sys.stderr.flush()
            except KeyboardInterrupt:  # it must not unwind through the builder's own frames
                self.stopped = True
            except (OSError, ValueError):  # nobody reads stderr any more
                pass
            return not self.stopped

        def phase_finish(self, phase_name):
            pass

    return Progress()
