//! What is done when, and what may not be done.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use cli::load::Rng;

use super::lab::{Kind as Role, Lab, Place};
use super::watch::Seen;

/// After a fault has ended, what it did may only show so much later: a node is trusted again when the cluster says
/// that it is in sync after this time.
const AFTERMATH: Duration = Duration::from_secs(3);

macro_rules! kinds {
    ($($kind:ident $name:literal $weight:literal $shortest:literal $longest:literal,)*) => {
        /// Kinds of faults.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind { $($kind,)* }

        impl Kind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];
            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }
            fn weight(self) -> u64 {
                match self { $(Self::$kind => $weight,)* }
            }
            /// How long it lasts, in ms, from and to.
            fn lasts(self) -> (u64, u64) {
                match self { $(Self::$kind => ($shortest, $longest),)* }
            }
        }
    };
}

// Name, how often, how long in ms (a lease is 6 s).
kinds! {
    KillNode "kill-node" 10 100 8_000,
    KillTwoNodes "kill-two-nodes" 5 100 6_000,
    KillWitness "kill-witness" 3 100 5_000,
    KillWitnesses "kill-both-witnesses" 2 100 4_000,
    KillLeader "kill-leader" 5 100 5_000,
    KillGateway "kill-gateway" 6 50 4_000,
    StopNode "stop-node" 8 100 1_400,
    StopNodeLong "stop-node-long" 6 2_000 12_000,
    StopAllNodes "stop-all-nodes" 2 500 4_000,
    StopLeader "stop-leader" 4 500 9_000,
    StopGateway "stop-gateway" 4 200 3_000,
    StopGatewayLong "stop-gateway-long" 3 7_000 12_000,
    Cut "cut" 6 500 10_000,
    CutOneWay "cut-one-way" 6 500 10_000,
    CutGatewayNode "cut-gateway-node" 5 500 10_000,
    CutGatewayNodeOneWay "cut-gateway-node-one-way" 6 500 10_000,
    CutGatewayLeader "cut-gateway-leader" 4 500 10_000,
    IsolateNode "isolate-node" 5 500 10_000,
    IsolateNodeOneWay "isolate-node-one-way" 5 500 10_000,
    IsolateLeader "isolate-leader" 4 500 10_000,
    IsolateGateway "isolate-gateway" 3 1_000 10_000,
    CutInitiators "cut-initiators" 3 500 8_000,
    CutInitiatorsOneWay "cut-initiators-one-way" 3 500 8_000,
    ResetNode "reset-gateway-node" 4 1 2,
    ResetInitiators "reset-initiators" 4 1 2,
    FullDisk "full-disk" 6 1_000 10_000,
    NoMajority "no-majority" 2 2_000 10_000,
    FailOverKilled "fail-over-killed" 3 1_000 6_000,
    FailOverStopped "fail-over-stopped" 3 3_000 14_000,
    FailOverIsolated "fail-over-isolated" 2 3_000 14_000,
    MoveVolume "move-volume" 3 1 2,
}

/// A fault as drawn; which members it means is known when it is its turn.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    pub kind: Kind,
    /// After the one before.
    pub gap: Duration,
    pub lasts: Duration,
    picks: [u64; 3],
}

/// Draws faults.
pub struct Plan {
    rng: Rng,
    kinds: Vec<Kind>,
}

impl Plan {
    /// The plan of a seed, of these kinds or of all.
    pub fn new(seed: u64, only: &[Kind]) -> Self {
        let kinds = if only.is_empty() { Kind::ALL.to_vec() } else { only.to_vec() };
        Self { rng: Rng::new(seed ^ 0x63_6861_6f73), kinds }
    }

    /// The next one.
    pub fn draw(&mut self) -> Draw {
        let sum: u64 = self.kinds.iter().map(|kind| kind.weight()).sum();
        let mut at = self.rng.below(sum);
        let kind = self.kinds.iter().copied().find(|kind| {
            let hit = at < kind.weight();
            at = at.wrapping_sub(kind.weight());
            hit
        });
        let kind = kind.expect("the draw is below the sum");
        let (shortest, longest) = kind.lasts();
        // Most come one by one, some on one another's heels.
        let gap = if self.rng.below(4) == 0 { self.rng.below(100) } else { self.rng.below(4_000) };
        let lasts = shortest + self.rng.below(longest - shortest);
        let picks = [self.rng.draw(), self.rng.draw(), self.rng.draw()];
        Draw { kind, gap: Duration::from_millis(gap), lasts: Duration::from_millis(lasts), picks }
    }
}

/// What is done for a fault, and undone after it.
#[derive(Clone, Debug, Default)]
pub struct Deed {
    pub kill: Vec<Place>,
    pub stop: Vec<Place>,
    /// From, to.
    pub cut: Vec<(Place, Place)>,
    pub reset: Option<(Place, Place)>,
    pub fill: Option<Place>,
    /// The gateway that is to serve the volume.
    pub export: Option<Place>,
    /// Voters that can't take part in raft meanwhile.
    mute: Vec<Place>,
    may_lose_majority: bool,
}

impl Deed {
    /// In words.
    pub fn describe(&self, lab: &Lab) -> String {
        let names = |places: &[Place]| places.iter().map(|p| lab.name(*p)).collect::<Vec<_>>().join(", ");
        let mut words = Vec::new();
        if !self.kill.is_empty() {
            words.push(format!("kill {}", names(&self.kill)));
        }
        if !self.stop.is_empty() {
            words.push(format!("stop {}", names(&self.stop)));
        }
        if !self.cut.is_empty() {
            let both = |(a, b): &(Place, Place)| self.cut.contains(&(*b, *a));
            let cuts = self.cut.iter().filter(|cut| !both(cut) || cut.0 < cut.1);
            let cuts = cuts.map(|cut| {
                let arrow = if both(cut) { "<->" } else { "->" };
                format!("{}{arrow}{}", lab.name(cut.0), lab.name(cut.1))
            });
            words.push(format!("cut {}", cuts.collect::<Vec<_>>().join(", ")));
        }
        if let Some((a, b)) = self.reset {
            words.push(format!("reset {}<->{}", lab.name(a), lab.name(b)));
        }
        if let Some(node) = self.fill {
            words.push(format!("fill the disk of {}", lab.name(node)));
        }
        if let Some(gateway) = self.export {
            words.push(format!("export on {}", lab.name(gateway)));
        }
        words.join("; ")
    }

    /// Nodes that the gateways cannot use meanwhile, though their processes live.
    fn soft(&self, lab: &Lab) -> BTreeSet<Place> {
        let is = |place: Place, role: Role| lab.members.get(place).is_some_and(|member| member.kind == role);
        let ends = self.cut.iter().flat_map(|(a, b)| [(*a, *b), (*b, *a)]).chain(self.reset);
        let cut = ends.filter(|(a, b)| is(*a, Role::Node) && is(*b, Role::Gateway)).map(|(node, _)| node);
        self.stop.iter().copied().filter(|place| is(*place, Role::Node)).chain(cut).collect()
    }

    /// Nodes that lose what only their process or their disk would have kept.
    fn hard(&self, lab: &Lab) -> BTreeSet<Place> {
        let killed = self.kill.iter().copied().filter(|place| lab.members[*place].kind == Role::Node);
        killed.chain(self.fill).collect()
    }
}

fn both_ways(pairs: impl IntoIterator<Item = (Place, Place)>) -> Vec<(Place, Place)> {
    pairs.into_iter().flat_map(|(a, b)| [(a, b), (b, a)]).collect()
}

impl Draw {
    /// The first fault of this kind on these picks, for a drill.
    pub fn drill(kind: Kind, lasts: Duration, picks: [u64; 3]) -> Self {
        Self { kind, gap: Duration::ZERO, lasts, picks }
    }

    /// What it means now.
    ///
    /// # Errors
    /// Says why it makes no sense now.
    pub fn resolve(&self, lab: &Lab, seen: &Seen) -> Result<Deed, &'static str> {
        let pick = |from: &[Place], which: usize| from[(self.picks[which] % from.len() as u64) as usize];
        let (nodes, witnesses, gateways) = (lab.of(Role::Node), lab.of(Role::Witness), lab.of(Role::Gateway));
        let voters: Vec<Place> = nodes.iter().chain(&witnesses).copied().collect();
        let node = pick(&nodes, 0);
        let other_node = pick(&nodes.iter().copied().filter(|n| *n != node).collect::<Vec<_>>(), 1);
        let leader = || seen.leader.ok_or("nobody is known to lead");
        let serving = || seen.serving.ok_or("nobody is known to serve the volume");
        let all_but = |place: Place, with_initiators: bool| {
            let end = lab.members.len() + usize::from(with_initiators);
            (0..end).filter(move |other| *other != place)
        };
        let one_way = self.picks[2].is_multiple_of(2);
        let turned = |cuts: Vec<(Place, Place)>| -> Vec<(Place, Place)> {
            if one_way { cuts } else { cuts.into_iter().map(|(a, b)| (b, a)).collect() }
        };
        let mut deed = Deed::default();
        match self.kind {
            Kind::KillNode => deed.kill = vec![node],
            Kind::KillTwoNodes => deed.kill = vec![node, other_node],
            Kind::KillWitness => deed.kill = vec![pick(&witnesses, 0)],
            Kind::KillWitnesses => deed.kill = witnesses,
            Kind::KillLeader => deed.kill = vec![leader()?],
            Kind::KillGateway => deed.kill = vec![serving()?],
            Kind::StopNode | Kind::StopNodeLong => deed.stop = vec![node],
            Kind::StopAllNodes => {
                deed.stop = nodes;
                deed.may_lose_majority = true;
            }
            Kind::StopLeader => deed.stop = vec![leader()?],
            Kind::StopGateway | Kind::StopGatewayLong => deed.stop = vec![serving()?],
            Kind::Cut | Kind::CutOneWay => {
                let all: Vec<Place> = (0..lab.members.len()).collect();
                let a = pick(&all, 0);
                let b = pick(&all_but(a, false).collect::<Vec<_>>(), 1);
                deed.cut = if self.kind == Kind::Cut { both_ways([(a, b)]) } else { vec![(a, b)] };
            }
            Kind::CutGatewayNode => deed.cut = both_ways([(serving()?, node)]),
            Kind::CutGatewayNodeOneWay => deed.cut = turned(vec![(serving()?, node)]),
            Kind::CutGatewayLeader => {
                let pair = (serving()?, leader()?);
                deed.cut = if self.picks[0].is_multiple_of(3) { both_ways([pair]) } else { turned(vec![pair]) };
            }
            Kind::IsolateNode => {
                deed.cut = both_ways(all_but(node, true).map(|other| (node, other)));
                deed.mute = vec![node];
            }
            Kind::IsolateNodeOneWay => {
                deed.cut = turned(all_but(node, true).map(|other| (node, other)).collect());
                deed.mute = vec![node];
            }
            Kind::IsolateLeader => {
                let leader = leader()?;
                deed.cut = both_ways(all_but(leader, true).map(|other| (leader, other)));
                deed.mute = vec![leader];
            }
            Kind::IsolateGateway | Kind::FailOverIsolated => {
                // Not from the initiators: what it tells them after its lease would be wrong.
                let gateway = serving()?;
                deed.cut = both_ways(voters.iter().map(|other| (gateway, *other)));
            }
            Kind::CutInitiators => deed.cut = both_ways([(serving()?, lab.initiators())]),
            Kind::CutInitiatorsOneWay => deed.cut = turned(vec![(serving()?, lab.initiators())]),
            Kind::ResetNode => deed.reset = Some((node, serving()?)),
            Kind::ResetInitiators => deed.reset = Some((lab.initiators(), serving()?)),
            Kind::FullDisk => deed.fill = Some(node),
            Kind::NoMajority => {
                let mut away = witnesses;
                away.push(node);
                match one_way {
                    true => deed.stop = away,
                    false => {
                        let pairs = away.iter().flat_map(|a| all_but(*a, false).map(|b| (*a, b)));
                        // Those two pairs that are away both are cut once in each list; that is well.
                        deed.cut = both_ways(pairs);
                        deed.mute = away;
                    }
                }
                deed.may_lose_majority = true;
            }
            Kind::FailOverKilled => deed.kill = vec![serving()?],
            Kind::FailOverStopped => deed.stop = vec![serving()?],
            Kind::MoveVolume => {}
        }
        let fails_over = [Kind::FailOverKilled, Kind::FailOverStopped, Kind::FailOverIsolated, Kind::MoveVolume];
        if fails_over.contains(&self.kind) {
            let serving = serving()?;
            let other = gateways.into_iter().find(|gateway| *gateway != serving);
            deed.export = Some(other.ok_or("there is one gateway only")?);
        }
        Ok(deed)
    }
}

/// What is out of order, so that nothing is done that a cluster need not survive.
pub struct Book {
    nodes: Vec<NodeEntry>,
    /// Faults that each place is under, whatever they are.
    busy: Vec<u32>,
    mute: Vec<u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct NodeEntry {
    faults: u32,
    /// Its disk was full since it was in sync.
    full: bool,
    /// Not seen in sync since its last fault ended.
    doubt: Option<Instant>,
}

impl Book {
    /// Everything is in order.
    pub fn new(lab: &Lab) -> Self {
        let places = lab.members.len() + 1;
        let nodes = vec![NodeEntry::default(); lab.of(Role::Node).len()];
        Self { nodes, busy: vec![0; places], mute: vec![0; places] }
    }

    /// Whether the deed may be done now.
    ///
    /// # Errors
    /// Says why not.
    pub fn allows(&self, deed: &Deed, lab: &Lab) -> Result<(), &'static str> {
        let processes = deed.kill.iter().chain(&deed.stop);
        if processes.clone().chain(&deed.export).any(|place| self.busy[*place] > 0) {
            return Err("a fault there already");
        }
        let (soft, hard) = (deed.soft(lab), deed.hard(lab));
        let sound = |node: &Place| {
            let entry = self.nodes[*node];
            entry.faults == 0 && entry.doubt.is_none() && !soft.contains(node) && !hard.contains(node)
        };
        let full = deed.fill.is_some() || self.nodes.iter().any(|node| node.full);
        // Where everybody else is gone, a full disk is the initiators' error (R2).
        if full && !(0..self.nodes.len()).any(|node| sound(&node)) {
            return Err("no node would be left that is in sync and untouched");
        }
        if deed.fill.is_some_and(|node| self.busy[node] > 0) {
            return Err("a fault there already");
        }
        let voters = lab.definition.members.len();
        let silent: BTreeSet<Place> = processes.chain(&deed.mute).copied().filter(|place| *place < voters).collect();
        let silent = (0..voters).filter(|place| silent.contains(place) || self.mute[*place] > 0).count();
        if silent > 0 && silent * 2 >= voters && !deed.may_lose_majority {
            return Err("the voters would have no majority");
        }
        Ok(())
    }

    fn places<'a>(&self, deed: &'a Deed) -> impl Iterator<Item = Place> + 'a {
        deed.kill.iter().chain(&deed.stop).chain(&deed.fill).copied()
    }

    /// The deed is being done.
    pub fn begins(&mut self, deed: &Deed, lab: &Lab) {
        for place in self.places(deed) {
            self.busy[place] += 1;
        }
        for place in deed.kill.iter().chain(&deed.stop).chain(&deed.mute) {
            self.mute[*place] += 1;
        }
        let hard = deed.hard(lab);
        for node in deed.soft(lab).union(&hard) {
            self.nodes[*node].faults += 1;
            self.nodes[*node].full |= deed.fill == Some(*node);
        }
    }

    /// The deed was undone.
    pub fn ended(&mut self, deed: &Deed, lab: &Lab) {
        for place in self.places(deed) {
            self.busy[place] -= 1;
        }
        for place in deed.kill.iter().chain(&deed.stop).chain(&deed.mute) {
            self.mute[*place] -= 1;
        }
        for node in deed.soft(lab).union(&deed.hard(lab)) {
            self.nodes[*node].faults -= 1;
            self.nodes[*node].doubt = Some(Instant::now());
        }
    }

    /// The cluster was looked at.
    pub fn saw(&mut self, seen: &Seen) {
        for (place, node) in self.nodes.iter_mut().enumerate() {
            let since = node.doubt.is_some_and(|since| seen.asked > since + AFTERMATH);
            if node.faults == 0 && since && seen.in_sync.contains(&place) {
                *node = NodeEntry::default();
            }
        }
    }

    /// Whether every node was seen in sync since its last fault.
    pub fn is_calm(&self) -> bool {
        self.nodes.iter().all(|node| node.faults == 0 && node.doubt.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kill(places: &[Place]) -> Deed {
        Deed { kill: places.to_vec(), ..Deed::default() }
    }

    fn stop(place: Place) -> Deed {
        Deed { stop: vec![place], ..Deed::default() }
    }

    #[test]
    fn while_a_disk_is_full_one_node_stays_untouched() {
        let lab = Lab::new(std::path::Path::new("nowhere"), 2);
        let mut book = Book::new(&lab);
        let gateway = lab.of(Role::Gateway)[0];
        let seen = |ahead: u64| Seen {
            asked: Instant::now() + Duration::from_secs(ahead),
            leader: None,
            serving: None,
            in_sync: [0, 1, 2].into(),
            epoch: 1,
            owner: None,
            waits: Vec::new(),
            table: String::new(),
        };
        let fill = |node| Deed { fill: Some(node), ..Deed::default() };
        let all = Deed { may_lose_majority: true, ..kill(&[0, 1, 2]) };
        assert!(book.allows(&kill(&[0, 1]), &lab).is_ok() && book.allows(&all, &lab).is_ok());
        assert!(book.allows(&kill(&[0, 1, 2]), &lab).is_err(), "of five voters");
        book.begins(&fill(0), &lab);
        book.begins(&stop(1), &lab);
        let cut = Deed { cut: vec![(gateway, 2)], ..Deed::default() };
        for last in [kill(&[2]), stop(2), cut, fill(2)] {
            assert!(book.allows(&last, &lab).is_err(), "{last:?}");
        }
        book.ended(&fill(0), &lab);
        book.saw(&seen(0));
        assert!(book.allows(&stop(2), &lab).is_err(), "it is too early to believe that node 0 is in sync");
        book.saw(&seen(60));
        assert!(book.allows(&stop(2), &lab).is_ok());
        assert!(book.allows(&stop(1), &lab).is_err(), "it is stopped");
        // No disk was full since: all may be stopped or killed, but for the voters' majority.
        book.begins(&stop(2), &lab);
        assert!(book.allows(&stop(0), &lab).is_err());
        assert!(book.allows(&Deed { may_lose_majority: true, ..stop(0) }, &lab).is_ok());
        assert!(book.allows(&Deed { may_lose_majority: true, ..kill(&[0]) }, &lab).is_ok());
        book.begins(&fill(0), &lab);
        assert!(book.allows(&Deed { may_lose_majority: true, ..kill(&[1]) }, &lab).is_err());
    }

    #[test]
    fn a_seed_is_one_plan_and_every_kind_comes() {
        let draws = |seed| {
            let mut plan = Plan::new(seed, &[]);
            (0..2_000).map(|_| plan.draw()).collect::<Vec<_>>()
        };
        let same = |a: &[Draw], b: &[Draw]| a.iter().zip(b).all(|(a, b)| format!("{a:?}") == format!("{b:?}"));
        assert!(same(&draws(1), &draws(1)));
        assert!(!same(&draws(1), &draws(2)));
        let kinds: BTreeSet<Kind> = draws(1).iter().map(|draw| draw.kind).collect();
        assert_eq!(kinds.len(), Kind::ALL.len());
    }
}
