//! Writes the kernels as CUDA C++, one file each, into a folder.
//!
//! ```text
//! cargo run -p locret-cube --features cuda-source --example cuda_source -- FOLDER
//! ```

use std::{env, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = PathBuf::from(env::args().nth(1).ok_or("the folder to write to")?);
    fs::create_dir_all(&folder)?;
    for source in locret_cube::cuda::sources()? {
        let file = source.name.replace(", ", "-").replace(' ', "_");
        let (name, units, shared) = (&source.name, source.units, source.shared);
        let text = format!(
            "// {name}\n// {units} units\n// {shared} bytes\n{}",
            source.text
        );
        fs::write(folder.join(file + ".cu"), text)?;
    }
    Ok(())
}
