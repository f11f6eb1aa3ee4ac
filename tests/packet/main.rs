//! Packets through the shipped object under `BPF_PROG_TEST_RUN`.
#[test]
fn the_object_loads() {
    let pins = xlb::datapath::Pins::new("packet-smoke");
    let _ = pins.remove_all();
    let datapath = xlb::datapath::kernel::KernelDatapath::open(pins.clone(), 1024).unwrap();
    use xlb::datapath::Datapath;
    println!("{:?}", datapath.read().unwrap());
    println!("{:?}", datapath.counters(&[0], &[1]).unwrap());
    pins.remove_all().unwrap();
}
