//! What more sessions, more volumes, larger volumes and more mirrors cost.

use std::thread;

use cli::bench::shape::Shape;
use cli::bench::target::Portal;

use super::peers::Md99;
use super::results::{By, medians};
use super::run::{Length, Run, say, shape};

/// How many sessions, and how many volumes, at once.
const AT_ONCE: [usize; 3] = [1, 4, 16];
/// Requests under way in each.
const DEPTH: usize = 8;
/// What is touched of each volume.
const REGION: u64 = 64 << 20;
/// The large volumes: one that is mostly holes, one that is written all over.
const LARGE: u64 = 1 << 40;
const WIDE: u64 = 100 << 30;

impl Run<'_> {
    pub(super) async fn scale(&mut self) -> anyhow::Result<()> {
        let options = self.options;
        say("starting a cluster for many sessions and volumes");
        let md99 = Md99::start(&options.program, &options.memory, 1 << 30, true)?;
        let most = AT_ONCE[AT_ONCE.len() - 1];
        let named = (1..most).map(|n| md99.volume(&format!("more-{n}"), 1 << 30, &[]));
        let volumes: Vec<Portal> = [Ok(md99.portal.clone())].into_iter().chain(named).collect::<Result<_, _>>()?;
        for portal in &volumes {
            self.load(portal, &Shape::fill(1 << 20), REGION, Length::Bytes(REGION)).await?;
        }
        for (name, percent, figures) in [
            ("4k reads", 100, ["4k reads, 16 sessions of depth 8", "4k reads, 16 volumes of depth 8"]),
            ("4k writes", 0, ["4k writes, 16 sessions of depth 8", "4k writes, 16 volumes of depth 8"]),
        ] {
            let shape = Shape::custom(4 << 10, percent, false, DEPTH, false);
            let mut sums = [const { Vec::new() }; 2];
            for at_once in AT_ONCE {
                say(&format!("{name}, {at_once} sessions, and {at_once} volumes"));
                let length = Length::Time(options.time);
                let one = self.sessions(&md99.portal, &shape, REGION, length, at_once, at_once as u64).await?;
                sums[0].push(one.figures.iops);
                sums[1].push(self.volumes(&volumes[..at_once], &shape)?);
            }
            for (figure, (kind, sums)) in figures.into_iter().zip(["sessions", "volumes"].into_iter().zip(sums)) {
                let best = sums.iter().copied().fold(0.0, f64::max);
                self.line(figure, By::Best, sums[AT_ONCE.len() - 1], "IOPS", Some(best), (0.9, 1.0));
                let each: Vec<String> = AT_ONCE.iter().zip(&sums).map(|(n, sum)| format!("{n}: {sum:.0}")).collect();
                self.note(format!("{kind}: {}", each.join(", ")));
            }
        }
        self.cost(&md99).await
    }

    /// One load for each volume, all at once; the sum.
    fn volumes(&self, volumes: &[Portal], shape: &Shape) -> anyhow::Result<f64> {
        let runtime = tokio::runtime::Handle::current();
        let length = Length::Time(self.options.time);
        let load = |portal, seed| runtime.block_on(self.sessions(portal, shape, REGION, length, 1, seed));
        let load = &load;
        let rounds: Vec<_> = tokio::task::block_in_place(|| {
            thread::scope(|scope| {
                let running: Vec<_> =
                    volumes.iter().zip(1..).map(|(portal, seed)| scope.spawn(move || load(portal, seed))).collect();
                running.into_iter().map(|thread| thread.join().expect("a load does not panic")).collect()
            })
        });
        rounds.into_iter().map(|round| round.map(|round| round.figures.iops)).sum()
    }

    /// The cost of a request where the volume is larger, or has other numbers of mirrors.
    async fn cost(&mut self, md99: &Md99) -> anyhow::Result<()> {
        let options = self.options;
        let targets = [
            ("1 GiB, 5 mirrors", md99.portal.clone(), REGION),
            ("1 TiB, 5 mirrors", md99.volume("large", LARGE, &[])?, REGION),
            ("1 GiB, 1 mirror", md99.volume("one-mirror", 1 << 30, &["--stripes", "1"])?, REGION),
            ("1 GiB, 15 mirrors", md99.volume("many-mirrors", 1 << 30, &["--stripes", "15"])?, REGION),
            ("all over 100 GiB, never written before", md99.volume("wide", WIDE, &[])?, WIDE),
        ];
        for (_, portal, region) in targets.iter().filter(|(_, _, region)| *region == REGION) {
            self.load(portal, &Shape::fill(1 << 20), *region, Length::Bytes(*region)).await?;
        }
        let pids = md99.pids()?;
        let mut rounds = Vec::new();
        for number in 1..=options.rounds.min(3) {
            for name in ["randread32", "randwrite32"] {
                say(&format!("round {number}: {name} on other volumes"));
                for (target, portal, region) in &targets {
                    let round = self.watched(portal, &pids, &shape(name), *region).await?;
                    rounds.push((name.to_owned(), (*target).to_owned(), round.figures, round.counts.errors));
                }
            }
        }
        self.results.measured.extend(medians(&rounds));
        Ok(())
    }
}
