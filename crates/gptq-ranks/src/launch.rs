//! A process's place among the ranks of a run, from a launcher's variables.
//!
//! | launcher | rank, number, rank on the host | rank 0's address | the run |
//! |---|---|---|---|
//! | `torchrun` | `RANK`, `WORLD_SIZE`, `LOCAL_RANK` | `MASTER_ADDR`, `MASTER_PORT` | `TORCHELASTIC_RUN_ID` |
//! | `mpirun` | `OMPI_COMM_WORLD_RANK`, `_SIZE`, `_LOCAL_RANK` | the same | `PMIX_NAMESPACE` |
//! | `srun` | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS`, `SLURM_LOCALID` | the same, else the step's first host | `SLURM_JOB_ID`, `SLURM_STEP_ID` |
//!
//! `SLURM_NTASKS` does not count: it is that of the allocation, in which a command may be run alone.

use crate::RankError;
use crate::threads::check_size;

/// Port of rank 0 where nothing names one.
const PORT: u16 = 29_500;
/// Ports after `MASTER_PORT` that rank 0 may take where `torchrun` listens there itself.
const NEXT_PORTS: u16 = 8;

/// A launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// PyTorch's, or anyone who sets its variables.
    Torchrun,
    /// Open MPI's.
    Mpirun,
    /// Slurm's.
    Srun,
}

impl Launcher {
    /// Returns its command.
    pub fn name(self) -> &'static str {
        match self {
            Launcher::Torchrun => "torchrun",
            Launcher::Mpirun => "mpirun",
            Launcher::Srun => "srun",
        }
    }

    /// Names of the variables with the rank, the number of ranks, and the rank among those of one host.
    fn variables(self) -> [&'static str; 3] {
        match self {
            Launcher::Torchrun => ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
            Launcher::Mpirun => [
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
            ],
            Launcher::Srun => ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"],
        }
    }

    /// Names of the variables that tell one run from another.
    fn of_run(self) -> &'static [&'static str] {
        match self {
            Launcher::Torchrun => &["TORCHELASTIC_RUN_ID"],
            Launcher::Mpirun => &["PMIX_NAMESPACE"],
            Launcher::Srun => &["SLURM_JOB_ID", "SLURM_STEP_ID"],
        }
    }
}

/// A process's place among the ranks of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankLaunch {
    /// Launcher that started it.
    pub launcher: Launcher,
    /// Its rank.
    pub rank: usize,
    /// Number of ranks.
    pub size: usize,
    /// Its rank among those of its host.
    pub local_rank: usize,
    /// Host name or address of rank 0.
    pub address: String,
    /// Ports of which rank 0 takes the first that is free.
    pub ports: Vec<u16>,
    /// Tells the run from others.
    pub run: String,
}

impl RankLaunch {
    /// Reads what a launcher has set, by a function that gives a variable's value; `None` if there is no launcher, or one
    /// rank alone.
    ///
    /// # Errors
    /// Variables that are missing or no numbers, or that do not fit together.
    pub fn of(
        variable: impl Fn(&'static str) -> Option<String>,
    ) -> Result<Option<RankLaunch>, RankError> {
        let set = |launcher: &Launcher| {
            launcher.variables()[..2]
                .iter()
                .all(|it| variable(it).is_some())
        };
        // Within Slurm, mpirun starts its processes by srun.
        let known = [Launcher::Torchrun, Launcher::Mpirun, Launcher::Srun];
        let Some(launcher) = known.into_iter().find(set) else {
            return Ok(None);
        };
        let number = |name: &'static str| {
            let value = variable(name);
            let value = value.map(|value| match value.parse::<usize>() {
                Ok(number) => Ok(number),
                Err(_) => Err(RankError::Variable {
                    name,
                    value,
                    wanted: "a number".to_owned(),
                }),
            });
            value.transpose()
        };
        let [rank_of, size_of, local_of] = launcher.variables();
        let (rank, size) = (number(rank_of)?, number(size_of)?);
        let (Some(rank), Some(size)) = (rank, size) else {
            return Ok(None);
        };
        check_size(size)?;
        if size == 1 {
            return Ok(None);
        }
        if rank >= size {
            return Err(RankError::Variable {
                name: rank_of,
                value: rank.to_string(),
                wanted: format!("below {size_of} = {size}"),
            });
        }
        let address = variable("MASTER_ADDR").or_else(|| match launcher {
            Launcher::Srun => first_host(&variable("SLURM_STEP_NODELIST")?),
            _ => None,
        });
        let address = address.ok_or(RankError::Unset {
            launcher: launcher.name(),
            name: rank_of,
            missing: "MASTER_ADDR",
        })?;
        let port = match (number("MASTER_PORT")?, launcher) {
            (Some(port), _) => u16::try_from(port).map_err(|_| RankError::Variable {
                name: "MASTER_PORT",
                value: port.to_string(),
                wanted: "a port".to_owned(),
            })?,
            // Jobs that share a host have ports of their own.
            (None, Launcher::Srun) => PORT + (number("SLURM_JOB_ID")?.unwrap_or(0) % 1000) as u16,
            (None, _) => PORT,
        };
        let taken = variable("TORCHELASTIC_USE_AGENT_STORE")
            .is_some_and(|it| it.eq_ignore_ascii_case("true"));
        let ports = match taken {
            // torchrun's own store listens there.
            true => (1..=NEXT_PORTS)
                .map(|next| port.wrapping_add(next).max(1024))
                .collect(),
            false => vec![port],
        };
        let run = launcher.of_run().iter().filter_map(|it| variable(it));
        Ok(Some(RankLaunch {
            launcher,
            rank,
            size,
            local_rank: number(local_of)?.unwrap_or(0),
            address,
            ports,
            run: run.collect::<Vec<_>>().join("."),
        }))
    }
}

/// Returns the first host of a list as Slurm writes it, such as `gpu[03-05,07],login1`.
fn first_host(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (name, rest) = list.split_at(end);
    let host = match rest.strip_prefix('[') {
        None => name.to_owned(),
        Some(numbers) => {
            let (numbers, after) = numbers.split_once(']')?;
            let first = numbers.split(['-', ',']).next()?;
            let after = &after[..after.find(',').unwrap_or(after.len())];
            format!("{name}{first}{after}")
        }
    };
    Some(host).filter(|host| !host.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<RankLaunch>, RankError> {
        RankLaunch::of(|name| {
            let found = variables.iter().find(|(own, _)| *own == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    const TORCHRUN: [(&str, &str); 5] = [
        ("RANK", "1"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "gpu1"),
        ("MASTER_PORT", "29400"),
    ];

    #[test]
    fn the_variables_of_each_launcher_are_read() {
        let launch = of(&TORCHRUN).unwrap().unwrap();
        assert_eq!((launch.rank, launch.size, launch.local_rank), (1, 4, 1));
        assert_eq!(
            (launch.address.as_str(), &launch.ports[..]),
            ("gpu1", &[29400][..])
        );

        let slurm = [
            ("SLURM_PROCID", "3"),
            ("SLURM_STEP_NUM_TASKS", "8"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_NODELIST", "gpu[07-09],x"),
            ("SLURM_JOB_ID", "1234"),
            ("SLURM_STEP_ID", "0"),
        ];
        let launch = of(&slurm).unwrap().unwrap();
        assert_eq!(
            (launch.launcher, launch.rank, launch.size),
            (Launcher::Srun, 3, 8)
        );
        assert_eq!(
            (launch.address.as_str(), &launch.ports[..]),
            ("gpu07", &[29734][..])
        );
        assert_eq!(launch.run, "1234.0");

        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "0"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("MASTER_ADDR", "a"),
        ];
        // srun's variables are those of mpirun's helpers.
        let within = [&mpi[..], &slurm[..]].concat();
        for variables in [&mpi[..], &within] {
            let launch = of(variables).unwrap().unwrap();
            assert_eq!((launch.launcher, launch.size), (Launcher::Mpirun, 2));
        }
    }

    #[test]
    fn rank_0_listens_beside_torchruns_own_store() {
        let agent = [&TORCHRUN[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        let ports = of(&agent).unwrap().unwrap().ports;
        assert_eq!(ports, (29401..=29408).collect::<Vec<u16>>());
    }

    #[test]
    fn a_command_run_alone_within_an_allocation_has_no_ranks() {
        let alone = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")];
        assert_eq!(of(&alone).unwrap(), None);
        assert_eq!(of(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap(), None);
        assert_eq!(of(&[]).unwrap(), None);
    }

    #[test]
    fn wrong_variables_are_named() {
        let with = |name: &'static str, value: &'static str| {
            let rest = TORCHRUN.into_iter().filter(|(own, _)| *own != name);
            let variables: Vec<_> = rest.chain([(name, value)]).collect();
            of(&variables).unwrap_err().to_string()
        };
        assert_eq!(with("RANK", "x"), "RANK = \"x\" is not a number");
        assert_eq!(
            with("RANK", "4"),
            "RANK = \"4\" is not below WORLD_SIZE = 4"
        );
        assert_eq!(
            with("WORLD_SIZE", "3"),
            "3 ranks cannot share a run; 1, 2, 4 and 8 can"
        );
        assert_eq!(
            with("MASTER_PORT", "70000"),
            "MASTER_PORT = \"70000\" is not a port"
        );
        let error = of(&TORCHRUN[..3]).unwrap_err().to_string();
        assert_eq!(
            error,
            "torchrun sets RANK, but not MASTER_ADDR; set it for every rank"
        );
    }

    #[test]
    fn the_first_host_of_slurms_list_is_found() {
        for (list, first) in [
            ("node1", "node1"),
            ("node1,node2", "node1"),
            ("gpu[03-05,07],login", "gpu03"),
            ("a[2,5]-ib,b", "a2-ib"),
        ] {
            assert_eq!(first_host(list).unwrap(), first);
        }
        assert_eq!(first_host(""), None);
        assert_eq!(first_host("a[1"), None);
    }
}
