"""What takes seconds to import, for the server that processes are forked from (`tests/processes.py`)."""

from dgpo_fast.config.command_line import quieten_libraries

quieten_libraries()

import dgpo_fast.lifecycle  # noqa: E402
import dgpo_fast.profiling.session  # noqa: E402, F401
