//! What goes wrong, and when.

use super::net::Party;
use super::world::{Event, MS, SECOND, World};

/// A class of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    KillNode,
    PowerCut,
    PowerCutAll,
    StopNode,
    KillGateway,
    StopGateway,
    TakeOver,
    Close,
    CutGateway,
    CutNodes,
    CutControl,
    OneWay,
    Reset,
    SlowHost,
    SlowDisk,
    WriteErrors,
    PunchErrors,
    ReadErrors,
    NoSpace,
    SyncFails,
    NoQuorum,
    KillAll,
}

impl Fault {
    pub const ALL: [Self; 22] = [
        Self::KillNode,
        Self::PowerCut,
        Self::PowerCutAll,
        Self::StopNode,
        Self::KillGateway,
        Self::StopGateway,
        Self::TakeOver,
        Self::Close,
        Self::CutGateway,
        Self::CutNodes,
        Self::CutControl,
        Self::OneWay,
        Self::Reset,
        Self::SlowHost,
        Self::SlowDisk,
        Self::WriteErrors,
        Self::PunchErrors,
        Self::ReadErrors,
        Self::NoSpace,
        Self::SyncFails,
        Self::NoQuorum,
        Self::KillAll,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::KillNode => "node killed",
            Self::PowerCut => "power cut",
            Self::PowerCutAll => "power cut everywhere",
            Self::StopNode => "node stopped",
            Self::KillGateway => "gateway killed",
            Self::StopGateway => "gateway stopped",
            Self::TakeOver => "take-over",
            Self::Close => "close",
            Self::CutGateway => "gateway cut off a node",
            Self::CutNodes => "nodes cut off each other",
            Self::CutControl => "gateway cut off the control plane",
            Self::OneWay => "one way cut",
            Self::Reset => "connection reset",
            Self::SlowHost => "slow host",
            Self::SlowDisk => "slow disk",
            Self::WriteErrors => "write errors",
            Self::PunchErrors => "punch errors",
            Self::ReadErrors => "read errors",
            Self::NoSpace => "no space",
            Self::SyncFails => "sync fails",
            Self::NoQuorum => "no quorum",
            Self::KillAll => "killed everywhere",
        }
    }
}

impl World {
    pub fn start_faults(&mut self) {
        self.faults_on = true;
        self.after(SECOND, Event::Fault);
    }

    pub(super) fn next_fault(&mut self) {
        if !self.faults_on || self.setup.faults.is_empty() {
            return;
        }
        let fault = self.rng.pick(&self.setup.faults.clone());
        self.counters.fault(fault.name());
        self.inject(fault);
        let wait = self.rng.between(self.setup.fault_every / 10, 2 * self.setup.fault_every);
        self.after(wait, Event::Fault);
    }

    fn a_node(&mut self) -> usize {
        self.rng.below(self.nodes.len() as u64) as usize
    }

    fn a_gateway(&mut self) -> usize {
        // Most often the one that serves.
        let owner = self.gateways.iter().position(|g| g.wanted);
        let any = self.rng.below(self.gateways.len() as u64) as usize;
        owner.filter(|_| self.rng.chance(800)).unwrap_or(any)
    }

    /// How long something lasts: mostly short, sometimes longer than a lease.
    fn a_while(&mut self) -> u64 {
        let longest = self.rng.pick(&[300 * MS, 2 * SECOND, 12 * SECOND]);
        self.rng.between(50 * MS, longest)
    }

    fn kill_for_a_while(&mut self, node: usize, power: bool) {
        self.kill_node(node, power);
        let boot = self.nodes[node].boot;
        let wait = self.a_while();
        self.after(wait, Event::NodeStarts { node, boot });
    }

    fn cut_for_a_while(&mut self, from: Party, to: Party) {
        self.log(|| format!("{from:?} does not reach {to:?} any more"));
        self.net.cut(from, to);
        let wait = self.a_while();
        self.after(wait, Event::Heal { from, to });
    }

    fn calm_in_a_while(&mut self, party: Party) {
        let wait = self.a_while();
        self.after(wait, Event::Calm { party });
    }

    pub fn inject(&mut self, fault: Fault) {
        let node = self.a_node();
        let gateway = self.a_gateway();
        let (n, g) = (Party::Node(node), Party::Gateway(gateway));
        self.log(|| format!("fault: {}", fault.name()));
        // After these a disk may not have what was written to it.
        let disk = [Fault::WriteErrors, Fault::PunchErrors, Fault::ReadErrors, Fault::NoSpace, Fault::SyncFails];
        self.lossless &= !disk.contains(&fault);
        match fault {
            Fault::KillNode => self.kill_for_a_while(node, false),
            Fault::PowerCut => self.kill_for_a_while(node, true),
            Fault::PowerCutAll => {
                let spared = self.rng.below(3 * self.nodes.len() as u64) as usize;
                for node in (0..self.nodes.len()).filter(|node| *node != spared) {
                    self.kill_for_a_while(node, true);
                }
            }
            Fault::StopNode => {
                self.stop(n);
                let wait = self.a_while();
                self.after(wait, Event::Resume { party: n });
            }
            Fault::KillGateway => {
                self.kill_gateway(gateway);
                let boot = self.gateways[gateway].boot;
                let wait = self.a_while();
                self.after(wait, Event::GatewayStarts { gateway, boot });
                if self.rng.chance(500) {
                    let other = self.rng.below(self.gateways.len() as u64) as usize;
                    let take_over = self.rng.chance(500);
                    self.want_on(other, take_over);
                }
            }
            Fault::StopGateway => {
                self.stop(g);
                let wait = self.a_while();
                self.after(wait, Event::Resume { party: g });
                if self.rng.chance(700) {
                    let take_over = self.rng.chance(700);
                    self.want_on((gateway + 1) % self.gateways.len(), take_over);
                }
            }
            Fault::TakeOver => self.want_on((gateway + 1) % self.gateways.len(), true),
            Fault::Close => {
                self.close_session(gateway);
                if self.rng.chance(300) {
                    self.want_on((gateway + 1) % self.gateways.len(), false);
                }
            }
            Fault::CutGateway => {
                self.cut_for_a_while(g, n);
                self.cut_for_a_while(n, g);
            }
            Fault::CutNodes => {
                let other = Party::Node((node + 1) % self.nodes.len());
                self.cut_for_a_while(n, other);
                self.cut_for_a_while(other, n);
            }
            Fault::CutControl => self.cut_for_a_while(g, Party::Control),
            Fault::OneWay => match self.rng.below(4) {
                0 => self.cut_for_a_while(g, n),
                1 => self.cut_for_a_while(n, g),
                2 => self.cut_for_a_while(n, Party::Node((node + 1) % self.nodes.len())),
                _ => self.cut_for_a_while(Party::Control, g),
            },
            Fault::Reset => self.reset_link(gateway, node),
            Fault::SlowHost => {
                self.net.slow.insert(n);
                self.calm_in_a_while(n);
            }
            Fault::SlowDisk => {
                self.nodes[node].disk.faults.slow = self.rng.pick(&[10, 100]);
                self.calm_in_a_while(n);
            }
            Fault::WriteErrors => {
                self.nodes[node].disk.faults.write_errors = self.rng.pick(&[20, 1000]);
                self.calm_in_a_while(n);
            }
            Fault::PunchErrors => {
                self.nodes[node].disk.faults.punch_errors = self.rng.pick(&[100, 1000]);
                self.calm_in_a_while(n);
            }
            Fault::ReadErrors => {
                self.distrust_all();
                self.nodes[node].disk.faults.read_errors = self.rng.pick(&[20, 1000]);
                self.calm_in_a_while(n);
            }
            Fault::NoSpace => {
                self.nodes[node].disk.faults.full = true;
                self.calm_in_a_while(n);
            }
            Fault::SyncFails => self.nodes[node].disk.faults.fail_sync = true,
            Fault::KillAll => {
                for node in 0..self.nodes.len() {
                    self.kill_for_a_while(node, false);
                }
                for gateway in 0..self.gateways.len() {
                    self.kill_gateway(gateway);
                    let boot = self.gateways[gateway].boot;
                    let wait = self.a_while();
                    self.after(wait, Event::GatewayStarts { gateway, boot });
                }
            }
            Fault::NoQuorum => {
                self.control.down = true;
                self.calm_in_a_while(Party::Control);
            }
        }
    }

    pub(super) fn calm(&mut self, party: Party) {
        self.log(|| format!("{party:?} is well again"));
        match party {
            Party::Node(node) => {
                self.nodes[node].disk.faults = Default::default();
                self.net.slow.remove(&party);
            }
            Party::Control => self.control.down = false,
            Party::Gateway(_) => {}
        }
    }

    /// Everything is well from here on: all processes run, everybody reaches everybody.
    pub fn heal(&mut self) {
        self.log(|| "everything heals".to_owned());
        (self.faults_on, self.healed) = (false, true);
        self.net.heal_all();
        self.stir_network();
        self.calm(Party::Control);
        for node in 0..self.nodes.len() {
            self.calm(Party::Node(node));
        }
        self.resume_all();
        for node in 0..self.nodes.len() {
            if self.nodes[node].is_down() {
                self.start_node(node);
            }
        }
        for gateway in 0..self.gateways.len() {
            if !self.gateways[gateway].alive {
                self.start_gateway(gateway);
            }
        }
        let owner = self.gateways.iter().position(|g| g.wanted).unwrap_or(0);
        let others = self.gateways.iter().enumerate().any(|(i, g)| i != owner && g.session.is_some());
        self.want_on(owner, others);
    }
}
