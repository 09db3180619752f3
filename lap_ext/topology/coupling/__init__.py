# SPDX-License-Identifier: MIT
"""Finds what of a model can only be removed together: channels, heads, experts, FFN units."""

from lap_ext.topology.coupling.explain import explained as explained
from lap_ext.topology.coupling.find import groups_of as groups_of
from lap_ext.topology.coupling.groups import Assigned as Assigned
from lap_ext.topology.coupling.groups import CoupledGroup as CoupledGroup
from lap_ext.topology.coupling.groups import CoupledGroups as CoupledGroups
from lap_ext.topology.coupling.groups import Family as Family
from lap_ext.topology.coupling.groups import Fixed as Fixed
from lap_ext.topology.coupling.groups import Member as Member

__all__ = [
    "Assigned",
    "CoupledGroup",
    "CoupledGroups",
    "Family",
    "Fixed",
    "Member",
    "explained",
    "groups_of",
]
