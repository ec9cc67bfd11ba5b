"""For the tests that need requirements-examples.txt.

TRL and datasets report their use to the hub, from a thread. While that thread looks up the
hub's address, a change of the environment elsewhere can crash the process (getaddrinfo against
setenv).
"""

import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # before anything imports huggingface_hub
