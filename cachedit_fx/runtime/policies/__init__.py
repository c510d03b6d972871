"""The policies, one file each. Importing a policy's file, in a line below, registers the policy."""

import cachedit_fx.runtime.policies.dbcache
import cachedit_fx.runtime.policies.dbprune
import cachedit_fx.runtime.policies.preset  # noqa: F401 - registers itself
