"""`lorakern serve`: adapters that come and go over HTTP, and completions in OpenAI's shapes that find their own.

`create_app` puts a `MixtureModel` behind HTTP; needs the extra `serve`.
"""

from lorakern.serve.app import create_app
from lorakern.serve.settings import Settings

__all__ = ["Settings", "create_app"]
