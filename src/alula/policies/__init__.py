"""Inference-time rules over a host's decoder: they train nothing, and a host without them is the host again.

Every policy is a file of its own that registers itself; see `Policy` for what one is made of.
"""

from alula.policies.base import Attached, Policy, Stand
from alula.policies.budget import Budget
from alula.policies.lifecycle import (
    active_policies,
    policies_from,
    policies_of,
    put_policies,
    read_policies,
    save_policies,
)
from alula.policies.parallel_attention import ParallelAttention
from alula.policies.prune import Prune
from alula.policies.registry import policy_of, policy_types, register
from alula.policies.search import Contributions, WithdrawalSearch, layer_contributions, search_withdrawal
from alula.policies.skip import Skip
from alula.policies.withdraw import Withdraw

__all__ = [
    "Attached",
    "Budget",
    "Contributions",
    "ParallelAttention",
    "Policy",
    "Prune",
    "Skip",
    "Stand",
    "Withdraw",
    "WithdrawalSearch",
    "active_policies",
    "layer_contributions",
    "policies_from",
    "policies_of",
    "policy_of",
    "policy_types",
    "put_policies",
    "read_policies",
    "register",
    "save_policies",
    "search_withdrawal",
]
