"""The policies: one file each. A line below registers it."""

import cachedit_fx.runtime.policies.dbcache
import cachedit_fx.runtime.policies.dbprune  # noqa: F401 - registers itself
