use stateright::*;
use stateright::report::*;
use ::model::*;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let mut cfg = config(args.get(1).map_or("A", |s| s)).unwrap();
    if let Some(m) = args.get(2) { cfg.mutant = Mutant::ALL.iter().copied().find(|x| format!("{x:?}") == *m); assert!(cfg.mutant.is_some()); }
    if let Ok(b) = std::env::var("B") { for kv in b.split(',') { let (k, v) = kv.split_once('=').unwrap(); let v: u8 = v.parse().unwrap(); let x = &mut cfg.bounds; match k { "writes" => x.writes = v, "reads" => x.reads = v, "flushes" => x.flushes = v, "cleans" => x.cleans = v, "cuts" => x.cuts = v, "kills" => x.kills = v, "losses" => x.losses = v, "deaths" => x.deaths = v, "opens" => x.opens = v, "closes" => x.closes = v, "lost" => x.lost_answers = v, "images" => x.images = v, "members" => cfg.members = v, "late" => cfg.late = v == 1, "store" => cfg.store_at_once = v == 1, "flush1" => cfg.flush_at_once = v == 1, _ => panic!() } } }
    struct R(std::time::Instant);
    impl Reporter<Config> for R {
        fn report_checking(&mut self, d: ReportData) { println!("{:?} states {} unique {} depth {} done {}", self.0.elapsed(), d.total_states, d.unique_states, d.max_depth, d.done); }
        fn report_discoveries(&mut self, _m: &Config, ds: std::collections::BTreeMap<&'static str, ReportDiscovery<Config>>) {
            for (n, d) in ds { println!("== {n} {}", d.classification);
              if matches!(d.classification, stateright::DiscoveryClassification::Counterexample) {
              let v = d.path.into_vec(); for (_, a) in &v { if let Some(a) = a { println!("{a:?}"); } } println!("   {:?}", v.last().unwrap().0); } }
        }
    }
    let c = cfg.checker().threads(2).finish_when(stateright::HasDiscoveries::AnyFailures).spawn_bfs();
    let c = c.join_and_report(&mut R(std::time::Instant::now()));
    for p in c.model().properties() { println!("{} {}", p.name, c.discovery(p.name).is_some()); }
}
