"""Measuring methods side by side: metrics, judges, sweeps, profiles, calibrations, the catalogue of systems.

Imports what builds a run (`difax.build`, `difax.program`) and every room below; only the front door and the commands
import it.
"""
