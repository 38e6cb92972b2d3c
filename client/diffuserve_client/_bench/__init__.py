"""`diffuserve bench`: a load generator, and what it says of a server.

mix -> what is asked;  load -> when;  run -> a record of each request;  figures -> what the records say;
report, plot -> for people
"""

from diffuserve_client._bench.command import bench

__all__ = ["bench"]
